"""Masks in a safetensors file: one bit a weight, for fine-tuned weights to be pruned again.

For each tensor with pruned layers the file holds one of the same name, uint8 of shape (⌈n/8⌉,): the
bits of the n values in row-major order, the most significant first, 1 = kept, and 0s to fill the
last byte. The metadata, strings as safetensors has them, hold `format`, and as JSON the tensors'
`shapes`, the `digests` (xxh3-128) of their bytes here, and the `report` of the pruned checkpoint.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gradpipe.errors import ODD_DOCUMENT, InputError, one_line
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.checkpoint.tensors import TensorInfo
from gradpipe.store.objects import digest, replacing

FORMAT = "gradpipe masks 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskFile:
    """A file of masks: its metadata, checked against its tensors."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]  # of the weights, by tensor
    digests: Mapping[str, str]  # of the bits
    report: Any  # `pruning.json` of the checkpoint that they were taken from

    @classmethod
    def open(cls, path: Path) -> Self:
        """InputError unless it is a whole file that `write_masks` wrote."""
        if not path.is_file():
            raise InputError(f"{path}: no such file, expected one that pipe mask export wrote")
        try:
            return cls._parse(path)
        except (SafetensorError, OSError, *ODD_DOCUMENT) as error:
            raise InputError(
                f"{path} is no whole file of masks ({one_line(error)}): expected what pipe mask "
                f"export writes ({FORMAT}): export or copy it again"
            ) from error

    @classmethod
    def _parse(cls, path: Path) -> Self:
        with safe_open(path, framework="numpy") as file:
            found = file.metadata() or {}
            sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
        if found.get("format") != FORMAT:
            raise ValueError(f"its format is {found.get('format')}")
        shapes = {name: tuple(map(int, x)) for name, x in json.loads(found["shapes"]).items()}
        digests = json.loads(found["digests"])
        if sizes != {name: [_packed_size(shape)] for name, shape in shapes.items()}:
            raise ValueError("its shapes are not those of its tensors")
        if digests.keys() != shapes.keys():
            raise ValueError("it lacks digests")
        report = json.loads(found["report"])
        return cls(path=path, shapes=shapes, digests=digests, report=report)

    def read(self, key: str) -> Tensor:
        """One tensor's mask, True = kept; InputError if its bits are damaged."""
        with safe_open(self.path, framework="numpy") as file:
            bits = file.get_tensor(key)
        if bits.dtype != np.uint8 or digest(bits.data) != self.digests[key]:
            raise InputError(f"{self.path}: the mask of {key} is damaged: export or copy it again")
        shape = self.shapes[key]
        return torch.from_numpy(np.unpackbits(bits, count=prod(shape)).view(bool)).view(shape)


def write_masks(
    path: Path, checkpoint: Checkpoint, places: Iterable[TensorInfo], report: Any
) -> None:
    """Write where these layers are not zero, a tensor at a time; `path` appears once it is whole.

    Of a tensor that holds other weights too, those are kept. The header is as long as it will be
    from the start: digests have one length.
    """
    layers: dict[str, list[TensorInfo]] = {}
    for place in places:
        layers.setdefault(place.key, []).append(place)
    shapes = {key: checkpoint.tensors[key].shape for key in layers}
    digests = dict.fromkeys(shapes, "0" * 32)
    with replacing(path) as file:
        file.write(_header(shapes, digests, report))
        for key in shapes:
            bits = np.packbits(_kept(checkpoint, key, layers[key]).numpy())
            digests[key] = digest(bits.data)
            file.write(bits.data)
        file.seek(0)
        file.write(_header(shapes, digests, report))


def _kept(checkpoint: Checkpoint, key: str, layers: Iterable[TensorInfo]) -> Tensor:
    """Per value of a tensor: True unless it is in one of its layers, and zero."""
    values, start = checkpoint.read(key).flatten(), checkpoint.tensors[key].start
    kept = torch.ones(len(values), dtype=torch.bool)
    for layer in layers:
        first, last = ((x - start) // values.element_size() for x in (layer.start, layer.stop))
        kept[first:last] = values[first:last] != 0
    return kept


def _header(
    shapes: Mapping[str, tuple[int, ...]], digests: Mapping[str, str], report: Any
) -> bytes:
    metadata = {
        "format": FORMAT,
        "shapes": json.dumps(shapes),
        "digests": json.dumps(digests),
        "report": json.dumps(report),
    }
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + _packed_size(shape)
        entries[key] = {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the tensors so
    return struct.pack("<Q", len(text)) + text


def _packed_size(shape: tuple[int, ...]) -> int:
    if min(shape, default=0) < 0:
        raise ValueError(f"a shape of {shape}")
    return -(-prod(shape) // 8)
