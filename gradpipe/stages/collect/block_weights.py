"""Weights for one part of a skeleton at a time, straight from the safetensors files."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.model.tensor_names import weight_keys


class WeightLoader:
    """Fills parts of a skeleton from its checkpoint, and empties them."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, device: torch.device) -> None:
        """`model` is a skeleton of `checkpoint`; InputError if a tensor is missing or misshapen."""
        self._model = model
        self._checkpoint = checkpoint
        self._device = device
        self._keys = weight_keys(model, checkpoint)

    @contextmanager
    def loaded(self, prefix: str, excluded: str | None = None) -> Iterator[None]:
        """The weights below `prefix` (but not below `excluded`) are on the device meanwhile."""

        def inside(name: str) -> bool:
            return name.startswith(prefix) and not (excluded and name.startswith(excluded))

        self._move_buffers(inside)
        names = [name for name in self._keys if inside(name)]
        tied: dict[str, nn.Parameter] = {}
        try:
            for name in names:
                self._load(name, tied)
            yield
        finally:
            for name in names:
                self._set(name, self._meta(name))
            tied.clear()
            _trim_heap()

    def _load(self, name: str, tied: dict[str, nn.Parameter]) -> None:
        key = self._keys[name]
        if key not in tied:
            wanted = self._get(name)
            tensor = self._checkpoint.read(key).to(self._device, wanted.dtype)
            tied[key] = nn.Parameter(tensor, requires_grad=False)
        self._set(name, tied[key])

    def _get(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        tensor: Tensor = getattr(self._model.get_submodule(owner), leaf)
        return tensor

    def _meta(self, name: str) -> nn.Parameter:
        tensor = self._get(name)
        return nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)

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


def _trim_heap() -> None:
    """Give freed memory back: glibc keeps it, in pieces, and the peak would grow with the depth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # musl has none
        trim(0)
