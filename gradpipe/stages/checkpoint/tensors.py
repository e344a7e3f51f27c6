"""Where each tensor of a safetensors file lies; its bytes as a tensor, and back."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gradpipe.errors import InputError

_COUNTED = 1 << 17  # values looked at together: they stay in a core's own cache

FLOAT_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

TYPES = FLOAT_TYPES | {  # integers are tables and counters; no layer is made of them
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies."""

    key: str
    file: str  # name of the safetensors file
    dtype: str  # safetensors' name: F32, BF16 ...
    shape: tuple[int, ...]
    start: int  # first byte in the file
    stop: int  # byte after the last

    @property
    def is_matrix(self) -> bool:
        """True for a 2-D float tensor with values, which is what can be pruned."""
        return len(self.shape) == 2 and 0 not in self.shape and self.dtype in FLOAT_TYPES

    def part(self, index: int, count: int) -> TensorInfo:
        """The `index`-th of `count` equal parts along the first dimension: a place of shape (a, b).

        Of a tensor (count · a, b) or (count, a, b). Raises InputError if it has no such part.
        """
        rank, first = len(self.shape), self.shape[0] if self.shape else 0
        is_stack = rank == 3 and first == count
        if not 0 <= index < count or not (is_stack or (rank == 2 and first % count == 0)):
            raise InputError(
                f"{self.key} of shape {self.shape} has no part {index} of {count}: give the model "
                "that the store was collected from"
            )
        shape = self.shape[1:] if is_stack else (first // count, self.shape[1])
        num_bytes = (self.stop - self.start) // count
        start = self.start + index * num_bytes
        return replace(self, shape=shape, start=start, stop=start + num_bytes)


def check_type(layer: str, info: TensorInfo) -> None:
    """Raises InputError for weights that are no floats: quantized ones cannot be pruned."""
    if info.dtype not in FLOAT_TYPES:
        raise InputError(
            f"layer {layer} is of type {info.dtype}: expected F16, BF16, F32 or F64 weights: give "
            "the model before it was quantized"
        )


def as_tensor(data: bytearray | memoryview, info: TensorInfo) -> Tensor:
    """`data` seen as the tensor that `info` describes, without a copy."""
    if not data:  # which torch takes for no buffer
        return torch.empty(info.shape, dtype=TYPES[info.dtype])
    return torch.frombuffer(data, dtype=TYPES[info.dtype]).view(info.shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    return tensor.view(torch.uint8).numpy().data


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of one safetensors file, once the library has found the file sound."""
    try:
        with path.open("rb"), safe_open(path, framework="pt"):
            pass
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}: restore it, or the right to read it"
        ) from error
    except SafetensorError as error:
        raise InputError(
            f"{path} is not a whole safetensors file ({error}): fetch it again"
        ) from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    base = 8 + length
    return {
        key: TensorInfo(
            key=key,
            file=path.name,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            start=base + entry["data_offsets"][0],
            stop=base + entry["data_offsets"][1],
        )
        for key, entry in header.items()
    }


def matrix_shape(info: TensorInfo, *, transposed: bool) -> tuple[int, ...]:
    """(out, in) of a tensor on disk."""
    return info.shape[::-1] if transposed else info.shape


def count_zeros(tensor: Tensor) -> int:
    """How many of a float tensor's values are zero, of either sign."""
    bits = np.frombuffer(tensor_bytes(tensor.flatten()), dtype=f"u{tensor.element_size()}")
    return tensor.numel() - sum(
        int(np.count_nonzero(bits[start : start + _COUNTED] << 1))
        for start in range(0, len(bits), _COUNTED)
    )


def owners(name: str) -> list[str]:
    """What a tensor or a module is in, by its name: `a` and `a.b`, of `a.b.weight`."""
    steps = name.split(".")
    return [".".join(steps[:end]) for end in range(1, len(steps))]
