"""Weights for one part of a skeleton at a time, straight from the safetensors files.

The store names the digest of each layer's weights, taken once; whoever loads weights checks them.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradpipe.errors import InputError
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.checkpoint.tensors import FLOAT_TYPES, as_tensor, tensor_bytes
from gradpipe.stages.model.buffers import fill_padding
from gradpipe.stages.model.experts import RoutedLinear
from gradpipe.stages.model.skeleton import Skeleton
from gradpipe.store.objects import digest
from gradpipe.store.schema import LayerSpec

_LINE_BYTES = 64


class WeightLoader:
    """Fills parts of a skeleton from its checkpoint, and empties them."""

    def __init__(self, skeleton: Skeleton, device: torch.device) -> None:
        self._model = skeleton.model
        self._checkpoint = skeleton.checkpoint
        self._sources = skeleton.sources
        self._device = device
        self._layers: dict[str, list[LayerSpec]] = {}
        for layer in skeleton.layers:
            self._layers.setdefault(layer.spec.weight_key, []).append(layer.spec)

    @contextmanager
    def loaded(self, prefix: str, excluded: str | None = None) -> Iterator[None]:
        """The weights below `prefix` (but not below `excluded`) are on the device meanwhile."""

        def inside(name: str) -> bool:
            return name.startswith(prefix) and not (excluded and name.startswith(excluded))

        self._move_buffers(inside)
        names = [name for name in self._sources.by_name if inside(name)]
        made: dict[str, nn.Parameter] = {}  # by its name in the source: tied ones are one
        try:
            for name in names:
                self._load(name, made)
            yield
        finally:
            for name in names:
                empty = torch.empty_like(self._get(name), device="meta")
                self._set(name, nn.Parameter(empty, requires_grad=False))
            made.clear()
            _trim_heap()

    def _load(self, name: str, made: dict[str, nn.Parameter]) -> None:
        source = self._sources.by_name[name]
        target = name if name in source.targets else source.targets[0]
        if target not in made:
            read = partial(self._read, dtype=self._get(name).dtype)
            tensors = source.make(read, self._model)
            made |= {x: nn.Parameter(t, requires_grad=False) for x, t in tensors.items()}
        self._set(name, made[target])
        fill_padding(self._model, name)

    def _read(self, key: str, dtype: torch.dtype) -> Tensor:
        data, whole = self._checkpoint.read_bytes(key), self._checkpoint.tensors[key]
        for layer in self._layers.get(key, ()):
            place = self._checkpoint.place(layer)
            own = memoryview(data)[place.start - whole.start : place.stop - whole.start]
            check_digest(layer, own, self._checkpoint)
        tensor = as_tensor(data, whole).to(self._device, dtype)
        return aligned(tensor) if len(self._layers.get(key, ())) > 1 else tensor

    def _get(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        tensor: Tensor = getattr(self._model.get_submodule(owner), leaf)
        return tensor

    def _set(self, name: str, value: nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(owner)
        if leaf in module._buffers:  # noqa: SLF001
            module._buffers[leaf] = value.data  # noqa: SLF001
        else:
            module._parameters[leaf] = value  # noqa: SLF001 (setattr would untie the name)

    def _move_buffers(self, inside: Callable[[str], bool]) -> None:
        """Bring real buffers to the device; they are small, and stay there."""
        for name, buffer in self._model.named_buffers():
            if inside(name) and not buffer.is_meta and buffer.device != self._device:
                owner, _, leaf = name.rpartition(".")
                self._model.get_submodule(owner)._buffers[leaf] = buffer.to(self._device)  # noqa: SLF001


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, in memory of its own where it starts off the lines of the CPU's caches.

    There the last bits of a product with few rows, such as an expert's, depend on the place.
    """
    return tensor if tensor.data_ptr() % _LINE_BYTES == 0 else tensor.clone()


def check_loaded(model: nn.Module, skeleton: Skeleton) -> None:
    """Check all layers' weights in a loaded model; those of another dtype, in the files again."""
    checkpoint = skeleton.checkpoint
    for layer in skeleton.layers:
        module: Any = model.get_submodule(layer.path)
        weight, place = module.weight.detach(), checkpoint.place(layer.spec)
        if isinstance(module, RoutedLinear) and layer.spec.transposed:
            weight = weight.T
        is_as_stored = weight.dtype == FLOAT_TYPES.get(place.dtype) and weight.shape == place.shape
        data = tensor_bytes(weight.cpu().contiguous()) if is_as_stored else None
        check_digest(layer.spec, data or checkpoint.read_place(place), checkpoint)


def check_digest(
    layer: LayerSpec, data: bytes | bytearray | memoryview, checkpoint: Checkpoint
) -> None:
    """Raises InputError if these are not the weights that were measured, if any were."""
    if layer.digest and digest(data) != layer.digest:
        raise InputError(
            f"{checkpoint.name}: the weights of {layer.name} are not those that the store was "
            "begun with: give the same checkpoint, another store or --overwrite"
        )


def _trim_heap() -> None:
    """Give freed memory back: glibc keeps it, in pieces, and the peak would grow with the depth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # musl has none
        trim(0)
