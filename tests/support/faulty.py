"""A proxy between a client and an HTTP server of this machine, which spoils some of the answers.

What is spoilt is decided by path and by how often that was asked for, so that a run is the same
however many threads ask.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import ClassVar

from tests.support.serving import Handler, serving

FAULTS = ("500", "slow", "cut", "truncated", "unheard", "time-out", "503")
STALL = 0.8  # seconds: longer than the client waits
LAG = 0.02  # of an answer that starts slowly
Spoil = Callable[[str, str, int], str | None]  # method, path, how often before -> a fault


def nothing(_: str, __: str, ___: int) -> None:
    """Spoil nothing."""


def twice(_: str, path: str, times: int) -> str | None:
    """Two different faults for each object, and then what was asked for."""
    return FAULTS[(zlib.crc32(path.encode()) + times) % len(FAULTS)] if times < 2 else None


class Proxy:
    """What went through, and what is to be spoilt."""

    def __init__(self, host: str, port: int) -> None:
        """Forward to this server."""
        self.server = (host, port)
        self.url = ""
        self.lock = threading.Lock()
        self.reset()

    def reset(self, spoil: Spoil = nothing, lag: float = 0.0) -> None:
        """Forget what went through."""
        self.spoil, self.lag = spoil, lag
        self.requests: list[str] = []  # "GET /bucket/key"
        self.times: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = 0

    def asked(self, method: str) -> list[str]:
        """Paths that were asked for with this method."""
        return [x.partition(" ")[2] for x in self.requests if x.startswith(f"{method} ")]


@contextlib.contextmanager
def proxy(host: str, port: int) -> Iterator[Proxy]:
    """A proxy on a free port."""
    made = Proxy(host, port)
    with serving(_Handler, proxy=made) as made.url:
        yield made


class _Handler(Handler):
    proxy: ClassVar[Proxy]

    def answer(self) -> None:
        proxy, path = self.proxy, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with proxy.lock:
            request = f"{self.command} {path}"
            times = proxy.times[request]
            proxy.times[request] += 1
            proxy.requests.append(request)
            proxy.in_flight += 1
            proxy.most_in_flight = max(proxy.most_in_flight, proxy.in_flight)
        try:
            fault = proxy.spoil(self.command, path, times)
            time.sleep(proxy.lag)
            if fault is not None:
                proxy.faults[fault] += 1
            with contextlib.suppress(OSError):  # the client may be gone
                self._send(body, fault)
        finally:
            with proxy.lock:
                proxy.in_flight -= 1

    def _send(self, body: bytes, fault: str | None) -> None:
        if fault in {"500", "503"}:
            self._refuse(int(fault))
            return
        status, headers, data = self._forward(body)
        if fault == "unheard":  # done, and nobody is told
            self.close_connection = True
            return
        if fault == "time-out":
            time.sleep(STALL)
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(LAG)
        is_whole = fault != "truncated" or self.command == "HEAD"
        sent = data if is_whole else data[: len(data) // 2]
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in {"content-length", "connection", "transfer-encoding"} and (
                is_whole or not name.lower().startswith(("x-amz-checksum", "content-range"))
            ):
                self.send_header(name, value)
        length = dict(headers).get("Content-Length", "0")
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(sent)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(sent if fault != "cut" else sent[: len(sent) // 2])
        self.close_connection = fault == "cut"

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.proxy.server, timeout=30)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _refuse(self, status: int) -> None:
        code = {500: "InternalError", 503: "SlowDown"}[status]
        data = f"<Error><Code>{code}</Code><Message>not now</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
