"""The same safetensors file again, with the bytes of some tensors replaced."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from gradpipe.errors import GradpipeError
from gradpipe.stages.checkpoint.tensors import TensorInfo, tensor_bytes
from gradpipe.store.objects import digest

_COPY_BYTES = 16 << 20


@contextmanager
def rewriting(source: Path, outputs: Sequence[Path]) -> Iterator[Rewriting]:
    """A safetensors file being copied to each output; what is not replaced is the same bytes.

    On leaving, the rest is copied and the outputs are durable.
    """
    with ExitStack() as stack:
        reader = stack.enter_context(source.open("rb"))
        writers = [stack.enter_context(path.open("wb")) for path in outputs]
        yield Rewriting(reader, writers)
        _copy(reader, writers, source.stat().st_size - reader.tell())
        for writer in writers:
            writer.flush()
            os.fsync(writer.fileno())


class Rewriting:
    """A file that is copied up to where it was last replaced."""

    def __init__(self, reader: BinaryIO, writers: Sequence[BinaryIO]) -> None:
        """Use `rewriting`."""
        self._reader = reader
        self._writers = writers

    def replace(self, place: TensorInfo, tensors: Iterable[Tensor]) -> list[str]:
        """Write one tensor to each output in a place; returns each one's digest, xxh3-128.

        Places come in file order. Tensors are taken one by one, and none outlives its turn.
        """
        _copy(self._reader, self._writers, place.start - self._reader.tell())
        digests = [
            _write(writer, tensor) for writer, tensor in zip(self._writers, tensors, strict=True)
        ]
        self._reader.seek(place.stop)
        return digests


def _write(writer: BinaryIO, tensor: Tensor) -> str:
    data = tensor_bytes(tensor)
    writer.write(data)
    return digest(data)


def _copy(reader: BinaryIO, writers: Sequence[BinaryIO], num_bytes: int) -> None:
    """Copy the next bytes to every writer."""
    while num_bytes:
        data = reader.read(min(num_bytes, _COPY_BYTES))
        if not data:
            raise GradpipeError(f"{reader.name} became shorter while it was copied")
        for writer in writers:
            writer.write(data)
        num_bytes -= len(data)
