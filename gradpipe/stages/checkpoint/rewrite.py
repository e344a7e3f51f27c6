"""The same safetensors file again, with the bytes of some tensors replaced."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from gradpipe.errors import GradpipeError
from gradpipe.stages.checkpoint.tensors import TensorInfo, tensor_bytes

_COPY_BYTES = 16 << 20


def rewrite(
    source: Path, outputs: Sequence[Path], replaced: Iterable[tuple[TensorInfo, Iterable[Tensor]]]
) -> None:
    """Copy a safetensors file to each output, with some tensors replaced, and make it durable.

    `replaced` comes in file order: each tensor's place and one new value for each output.
    """
    with ExitStack() as stack:
        reader = stack.enter_context(source.open("rb"))
        writers = [stack.enter_context(path.open("wb")) for path in outputs]
        for info, tensors in replaced:
            _copy(reader, writers, info.start - reader.tell())
            _write(writers, tensors)
            reader.seek(info.stop)
        _copy(reader, writers, source.stat().st_size - reader.tell())
        for writer in writers:
            writer.flush()
            os.fsync(writer.fileno())


def _write(writers: Sequence[BinaryIO], tensors: Iterable[Tensor]) -> None:
    """One tensor to each writer; none outlives its turn."""
    for writer, tensor in zip(writers, tensors, strict=True):
        writer.write(tensor_bytes(tensor))


def _copy(reader: BinaryIO, writers: Sequence[BinaryIO], num_bytes: int) -> None:
    """Copy the next bytes to every writer."""
    while num_bytes:
        data = reader.read(min(num_bytes, _COPY_BYTES))
        if not data:
            raise GradpipeError(f"{reader.name} became shorter while it was copied")
        for writer in writers:
            writer.write(data)
        num_bytes -= len(data)
