"""Objects of a store far away, nearer: fetched several at once before they are asked for, and kept.

A round trip takes as long as megabytes do. `ReadAhead` hides it behind the work on other layers;
`ObjectCache` saves it, and the bytes, for the next run. Neither is trusted: what a cache holds is
checked by size and digest whenever it is read.
"""

import os
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, local

import xxhash

from gradpipe.errors import GradpipeError

_AT_ONCE = 8  # requests: more only share the same line
_HELD_BYTES = 1 << 28  # of objects that were fetched, wanted again or not


@dataclass(frozen=True, slots=True)
class ObjectCache:
    """A folder of objects by their digests, which any number of processes and stores share."""

    folder: Path

    def read(self, size: int, digest: str) -> bytes | None:
        """The object of this size and digest; None if it is not here, or not whole."""
        try:
            path = self._path(size, digest)
            data = path.read_bytes() if path.stat().st_size == size else b""
        except OSError:
            return None
        return data if xxhash.xxh3_128_hexdigest(data) == digest else None

    def write(self, digest: str, data: bytes) -> None:
        """Keep an object: whole or not at all, whoever else is writing it."""
        path = self._path(len(data), digest)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(path)
        except OSError as error:
            raise GradpipeError(
                f"cannot write to --cache {self.folder}: {error.strerror}: make room, give another "
                "folder, or leave it out"
            ) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _path(self, size: int, digest: str) -> Path:
        return self.folder / digest[:2] / f"{digest}-{size}"


class ReadAhead:
    """Objects that are being fetched, or have been a short while ago: the latest, by their bytes.

    No thread outlives `close`.
    """

    def __init__(self, fetch: Callable[[str], bytes], size_of: Callable[[str], int]) -> None:
        """`fetch` gets an object, from several threads."""
        self._fetch, self._size_of = fetch, size_of
        self._pool = ThreadPoolExecutor(_AT_ONCE)
        self._objects: OrderedDict[str, Future[bytes]] = OrderedDict()  # the latest at the end
        self._held = 0  # bytes of them
        self._lock = Lock()
        self._own = local()  # what this thread is about to read: it cannot be dropped

    def close(self) -> None:
        """Wait for what is under way; drop what waits."""
        self._pool.shutdown(cancel_futures=True)

    def begin(self, now: Iterable[str], later: Iterable[str]) -> None:
        """Fetch what this thread reads now, and as far as there is room what is read later."""
        self._own.objects = {key: self._get(key) for key in now}
        room = _HELD_BYTES // 2
        for key in later:
            room -= self._size_of(key)
            if room < 0:
                return
            self._get(key)

    def read(self, key: str) -> bytes:
        """An object, fetched before, or now; raises what fetching it raised."""
        own: dict[str, Future[bytes]] = getattr(self._own, "objects", {})
        return (own.pop(key, None) or self._get(key)).result()

    def _get(self, key: str) -> Future[bytes]:
        with self._lock:
            future = self._objects.pop(key, None)
            if future is None:
                self._held += self._size_of(key)
            if future is None or (future.done() and future.exception() is not None):
                future = self._pool.submit(self._fetch, key)
            self._objects[key] = future
            self._drop()
        return future

    def _drop(self) -> None:
        """Let the oldest go, but for those under way."""
        while self._held > _HELD_BYTES:
            key, future = next(iter(self._objects.items()))
            if not future.done():
                return
            self._held -= self._size_of(key)
            del self._objects[key]
