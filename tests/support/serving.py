"""HTTP servers of this machine that live while a test looks at them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """One request, answered the same way whatever its method; nothing is printed."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        """Answer `self.command` of `self.path`."""
        raise NotImplementedError

    def log_message(self, *args: object) -> None:
        """Print nothing: the servers remember what they were asked."""

    def __getattr__(self, name: str) -> object:
        """`do_GET`, `do_PUT`, …, as the server looks them up."""
        if name.startswith("do_"):
            return self.answer
        raise AttributeError(name)


@contextlib.contextmanager
def serving(handler: type[Handler], **attributes: object) -> Iterator[str]:
    """The address of a server whose handler has these attributes, on a free port."""
    made = type(handler.__name__, (handler,), attributes)
    with ThreadingHTTPServer(("127.0.0.1", 0), made) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
