"""Block inputs and gradients between passes, in a folder: what one block's work needs at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from gradpipe.errors import GradpipeError


class ActivationFile:
    """(samples, tokens, hidden) values in one file, published once all of them are written."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        """Nothing is read or written yet."""
        self.path = path
        self.shape_NTH = shape
        self.dtype = dtype
        self._part = path.with_name(path.name + ".part")

    @property
    def num_bytes(self) -> int:
        """Size of the whole file."""
        return self._sample_bytes * self.shape_NTH[0]

    @property
    def _sample_bytes(self) -> int:
        return self.shape_NTH[1] * self.shape_NTH[2] * self.dtype.itemsize

    def exists(self) -> bool:
        """True once it is whole."""
        return self.path.is_file() and self.path.stat().st_size == self.num_bytes

    def write(self, start: int, values_BTH: Tensor) -> None:
        """Write the values of consecutive samples, the first being `start`; in order."""
        raw = values_BTH.detach().cpu().contiguous().flatten().view(torch.uint8)
        with _disk_errors(self._part), self._part.open("wb" if start == 0 else "r+b") as file:
            file.seek(start * self._sample_bytes)
            file.write(raw.numpy().data)

    def publish(self) -> None:
        """Make the file whole and durable."""
        with _disk_errors(self._part):
            with self._part.open("r+b") as file:
                os.fsync(file.fileno())
            self._part.replace(self.path)

    def read(self, start: int, count: int) -> Tensor:
        """The values of `count` samples, (count, tokens, hidden), on the CPU."""
        data = bytearray(count * self._sample_bytes)
        with _disk_errors(self.path), self.path.open("rb") as file:
            file.seek(start * self._sample_bytes)
            if file.readinto(data) != len(data):
                raise OSError("it became shorter")
        values = torch.frombuffer(data, dtype=self.dtype)
        return values.view(count, *self.shape_NTH[1:])

    def delete(self) -> None:
        """Free the space."""
        self.path.unlink(missing_ok=True)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Say which file a failure of the disk is about, and what to do."""
    try:
        yield
    except OSError as error:
        raise GradpipeError(
            f"scratch file {path}: {error.strerror or error}: make room, or give another --scratch "
            "folder, then run the same command again"
        ) from error
