"""What a layer's name tells, as `pruning.json` has it: its list of blocks, its weights' place."""

import re

from gradpipe.errors import InputError
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.checkpoint.tensors import FLOAT_TYPES, TensorInfo


def list_of(name: str) -> str | None:
    """The list of blocks that a name is in: `model.layers` for `model.layers.0.mlp.gate`."""
    found = re.match(r"(.+?)\.\d+\.", name)
    return found[1] if found else None


def find_layer(checkpoint: Checkpoint, name: str, size: int) -> TensorInfo | None:
    """Where a layer of `size` weights lies: in a tensor of its name, or as a numbered part of one.

    None if the checkpoint has no such weights.
    """
    for key in (f"{name}.weight", name):
        if info := _floats(checkpoint, key):
            return info if _size(info) == size else None
    stem, _, index = name.rpartition(".")
    for key in (f"{stem}.weight", stem):
        if (info := _floats(checkpoint, key)) and index.isdecimal():
            return _part(info, int(index), size)
    return None


def _floats(checkpoint: Checkpoint, key: str) -> TensorInfo | None:
    info = checkpoint.tensors.get(key)
    return info if info is not None and info.dtype in FLOAT_TYPES else None


def _part(info: TensorInfo, index: int, size: int) -> TensorInfo | None:
    count, rest = divmod(_size(info), size)
    try:
        return None if rest else info.part(index, count)
    except InputError:
        return None


def _size(info: TensorInfo) -> int:
    return (info.stop - info.start) // FLOAT_TYPES[info.dtype].itemsize
