"""The same safetensors file again, with the bytes of some tensors replaced."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from gradpipe.errors import GradpipeError
from gradpipe.stages.checkpoint.tensors import TensorInfo, tensor_bytes
from gradpipe.store.objects import digest

_COPY_BYTES = 4 << 20
_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE, and wait for nothing


@contextmanager
def rewriting(
    source: Path, outputs: Sequence[Path], places: Iterable[TensorInfo]
) -> Iterator[Rewriting]:
    """A safetensors file being copied to each output, but for these places, which are replaced.

    Several processes may write one output, each its own parts. On leaving without an error, what
    this one wrote is durable.
    """
    with ExitStack() as stack:
        reader = stack.enter_context(source.open("rb", buffering=0)).fileno()
        opened = (stack.enter_context(open(x, "wb", 0, opener=_kept)) for x in outputs)
        writers = [file.fileno() for file in opened]
        for writer in writers:
            os.ftruncate(writer, os.fstat(reader).st_size)
        yield Rewriting(source, reader, writers, places)
        for writer in writers:
            os.fsync(writer)


def _kept(path: str, _: int) -> int:
    """Open a file for writing, with what is in it."""
    return os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)


class Rewriting:
    """A file whose parts are written in any order, by any thread."""

    def __init__(
        self, source: Path, reader: int, writers: Sequence[int], places: Iterable[TensorInfo]
    ) -> None:
        self._source = source
        self._reader = reader
        self._writers = writers
        self._places = sorted(places, key=lambda place: place.start)

    def replace(self, place: TensorInfo, tensors: Iterable[Tensor]) -> list[str]:
        """Write one tensor to each output in a place; returns each one's digest, xxh3-128.

        Tensors are taken one by one, and none outlives its turn.
        """
        return [
            _write(writer, tensor_bytes(tensor), place.start)
            for writer, tensor in zip(self._writers, tensors, strict=True)
        ]

    def copy_rest(self) -> None:
        """Copy to every output the bytes that are in no place."""
        size = os.fstat(self._reader).st_size
        starts = [0, *(place.stop for place in self._places)]
        stops = [*(place.start for place in self._places), size]
        for start, stop in zip(starts, stops, strict=True):
            for at in range(start, stop, _COPY_BYTES):
                data = os.pread(self._reader, min(_COPY_BYTES, stop - at), at)
                if len(data) != min(_COPY_BYTES, stop - at):
                    raise GradpipeError(f"{self._source} became shorter while it was copied")
                for writer in self._writers:
                    _write_at(writer, memoryview(data), at)


def _write(writer: int, data: memoryview, start: int) -> str:
    found = digest(data)  # first: the next read of the same bytes finds them in the cache
    _write_at(writer, data, start)
    return found


def _write_at(writer: int, data: memoryview, start: int) -> None:
    """Write all, though the system may take less at a time."""
    data = data.cast("B")
    while data:
        written = os.pwrite(writer, data, start)
        _send_to_disk(writer, start, written)
        data, start = data[written:], start + written


def _send_to_disk(writer: int, start: int, size: int) -> None:
    """Start what fsync waits for while there is still work to do; Linux alone can.

    Where it fails, as on some network file systems, fsync does all of it.
    """
    send = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
    if send is not None:
        send(writer, ctypes.c_int64(start), ctypes.c_int64(size), _START_WRITING)
