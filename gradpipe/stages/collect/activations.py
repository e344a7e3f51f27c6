"""What the streamed schedule keeps on disk between its passes, and what is left to do with it.

Of N blocks there are N + 1 boundaries, the last one before the model's head. In one folder lie

    arguments       what blocks are called with, where that depends on the samples: block 0's
                    hidden states, and what else the model computes before the blocks
    inputs-0003     what blocks 3 and later, or the head, get of what blocks before 3 gave: the
                    hidden states, and keys and values that blocks share
    gradient-0003   the gradient of the loss with respect to it
    outside-0003    the gradient with respect to those of block 3's arguments that come from
                    collected layers outside the blocks

Each holds named tensors of any shape for each micro-batch, and is whole or not there at all. The
order of axes in memory is kept: products of a transposed tensor may have other last bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradpipe.errors import ODD_DOCUMENT
from gradpipe.store.objects import disk_errors

_LENGTH_BYTES = 8  # the size of the index, at the very end


class TensorFile:
    """Named tensors for each micro-batch, in one file, published once all of them are written.

    The tensors' bytes, then an index in JSON, then its length. One tensor under several names is
    written once.
    """

    def __init__(self, path: Path, sizes: tuple[int, ...]) -> None:
        """`sizes` are the micro-batches' numbers of samples; nothing is read or written yet."""
        self.path = path
        self._sizes = sizes
        self._part = path.with_name(path.name + ".part")
        self._index: list[dict[str, Any]] = []  # by micro-batch: name -> type, shape, start, axes
        self._end = 0

    def exists(self) -> bool:
        """True if it is whole, and of these micro-batches."""
        try:
            self._read_index()
        except (OSError, *ODD_DOCUMENT):
            return False
        return True

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Append the tensors of the next micro-batch."""
        entries, places = {}, dict[int, int]()
        with _disk_errors(self._part), self._part.open("r+b" if self._index else "wb") as file:
            file.seek(self._end)
            for name, tensor in tensors.items():
                axes = _axes(tensor)
                if id(tensor) not in places:
                    in_order = tensor.detach().cpu().permute(axes).contiguous()
                    places[id(tensor)] = self._end
                    self._end += file.write(in_order.flatten().view(torch.uint8).numpy().data)
                dtype = str(tensor.dtype).removeprefix("torch.")
                entries[name] = (dtype, list(tensor.shape), places[id(tensor)], axes)
        self._index.append(entries)

    def publish(self) -> None:
        """Make the file whole and durable."""
        document = {"sizes": self._sizes, "end": self._end, "index": self._index}
        index = json.dumps(document).encode()
        with _disk_errors(self._part):
            with self._part.open("r+b") as file:
                file.seek(self._end)
                file.write(index + len(index).to_bytes(_LENGTH_BYTES, "little"))
                file.flush()
                os.fsync(file.fileno())
            self._part.replace(self.path)

    def read(self, number: int, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Those of a micro-batch's tensors that have these names, or all, on the CPU."""
        with _disk_errors(self.path), self.path.open("rb") as file:
            if not self._index:
                self._read_index()
            entries = self._index[number]
            found = entries.keys() if names is None else [n for n in names if n in entries]
            return {name: _read(file, *entries[name]) for name in found}

    def delete(self) -> None:
        """Free the space."""
        self.path.unlink(missing_ok=True)

    def _read_index(self) -> None:
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(size - _LENGTH_BYTES)
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            file.seek(size - _LENGTH_BYTES - length)
            document = json.loads(file.read(length))
        if tuple(document["sizes"]) != self._sizes:
            raise ValueError("of other micro-batches")
        if document["end"] + length + _LENGTH_BYTES != size:
            raise ValueError("cut off")
        self._index, self._end = document["index"], document["end"]


def _axes(tensor: Tensor) -> list[int]:
    """The axes in the order in which they lie in memory; as they are where they lie with gaps."""
    natural, strides = list(range(tensor.ndim)), tensor.stride()
    axes = sorted(natural, key=lambda axis: -strides[axis])
    is_dense = not tensor.is_contiguous() and tensor.permute(axes).is_contiguous()
    return axes if is_dense else natural


def _read(file: Any, dtype: str, shape: list[int], start: int, axes: list[int]) -> Tensor:
    kind = getattr(torch, dtype)
    data = bytearray(torch.Size(shape).numel() * kind.itemsize)
    file.seek(start)
    if file.readinto(data) != len(data):
        raise OSError("it became shorter")
    if not data:
        return torch.empty(shape, dtype=kind)
    in_order = torch.frombuffer(data, dtype=kind).view([shape[axis] for axis in axes])
    return in_order.permute([axes.index(axis) for axis in range(len(axes))])


class Activations:
    """The files of one run, in a folder that may hold what an earlier, killed run left."""

    def __init__(self, folder: Path, sizes: tuple[int, ...], depth: int) -> None:
        """Make the folder; `sizes` are the micro-batches', `depth` is the number of blocks."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._sizes = sizes
        self._depth = depth
        self.arguments = self._file("arguments")

    def inputs(self, boundary: int) -> TensorFile:
        """Of what earlier blocks gave, what comes in at a boundary."""
        return self._file(f"inputs-{boundary:04d}")

    def gradient(self, boundary: int) -> TensorFile:
        """The gradient of the loss with respect to `inputs`."""
        return self._file(f"gradient-{boundary:04d}")

    def outside(self, block: int) -> TensorFile:
        """The gradient with respect to a block's arguments that come from layers outside."""
        return self._file(f"outside-{block:04d}")

    def kept(self) -> Kept:
        """Which files are there, whole."""
        boundaries = range(1, self._depth + 1)
        return Kept(
            inputs=frozenset(i for i in boundaries if self.inputs(i).exists()),
            gradients=frozenset(i for i in boundaries if self.gradient(i).exists()),
            outside=frozenset(i for i in range(self._depth) if self.outside(i).exists()),
        )

    def _file(self, name: str) -> TensorFile:
        return TensorFile(self._folder / name, self._sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Which files an earlier run has left."""

    inputs: frozenset[int]  # boundaries
    gradients: frozenset[int]  # boundaries
    outside: frozenset[int]  # blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Todo:
    """What is left to run, in this order."""

    forward: tuple[int, ...]  # blocks, first to last, for what they give
    head: bool
    backward: tuple[int, ...]  # blocks, last to first, for their sums and gradients


def remaining(
    depth: int, kept: Kept, blocks: frozenset[int], *, head: bool, backward: bool
) -> Todo:
    """What must run so that `blocks`, and the `head` if it is asked for, can give their sums.

    With `backward`, a block needs the gradient of what it gives: of the block after it, or of the
    head. Whatever runs needs its inputs: of the block before it. A pure function of what is kept.
    """
    running = set(blocks)
    for index in range(depth) if backward else ():
        if index in running and index + 1 not in kept.gradients:
            running.add(index + 1)  # `depth` stands for the head
    if head:
        running.add(depth)
    needed, forward = set(running), set[int]()
    for index in reversed(range(1, depth + 1)):
        if index in needed and index not in kept.inputs:
            forward.add(index - 1)
            needed.add(index - 1)
    return Todo(
        forward=tuple(sorted(forward)),
        head=depth in running,
        backward=tuple(sorted(running - {depth}, reverse=True)),
    )


def _disk_errors(path: Path) -> AbstractContextManager[None]:
    return disk_errors(f"scratch file {path}", "make room, or give another --scratch folder")
