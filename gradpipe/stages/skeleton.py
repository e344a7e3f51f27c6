"""A model without its weights, and weights for one part of it at a time.

Built on the meta device from the config alone; buffers that no checkpoint holds (rotary
frequencies, embedding scales) are computed as `from_pretrained` computes them. Weights come
straight from the safetensors files, and go when they are no longer needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from gradpipe.stages.checkpoint import FLOAT_TYPES, Checkpoint
from gradpipe.stages.model import weight_key


def model_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What the checkpoint says it is in: its config's dtype, else its first weight's."""
    name = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    return next(FLOAT_TYPES[t.dtype] for t in checkpoint.tensors.values() if t.dtype in FLOAT_TYPES)


def build_skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The causal language model on the meta device, in eval mode, frozen, its buffers real."""
    config = AutoConfig.from_pretrained(checkpoint.folder)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    owners = set()
    for name, buffer in model.named_non_persistent_buffers():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(
            leaf, torch.empty_like(buffer, device="cpu"), persistent=False
        )
        owners.add(owner)
    for owner in sorted(owners):
        model._init_weights(model.get_submodule(owner))  # noqa: SLF001 (as from_pretrained does)
    model.tie_weights()
    return model.eval().requires_grad_(requires_grad=False)


class WeightLoader:
    """Fills parts of a skeleton from its checkpoint, and empties them."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, device: torch.device) -> None:
        """`model` is a skeleton of `checkpoint`."""
        self._model = model
        self._checkpoint = checkpoint
        self._device = device

    @contextmanager
    def loaded(self, prefix: str, excluded: str | None = None) -> Iterator[None]:
        """The weights below `prefix` (but not below `excluded`) are on the device meanwhile."""
        names = [
            name
            for name, _ in self._tensors(prefix)
            if excluded is None or not name.startswith(excluded)
        ]
        tied: dict[str, nn.Parameter] = {}
        buffers = self._move_buffers(prefix, excluded)
        try:
            for name in names:
                self._load(name, tied)
            yield
        finally:
            for name in names:
                self._set(name, self._meta(name))
            del buffers

    def _tensors(self, prefix: str) -> Iterable[tuple[str, Tensor]]:
        """Parameters and persistent buffers on the meta device, tied ones under each name."""
        for name, tensor in self._model.named_parameters(remove_duplicate=False):
            if name.startswith(prefix):
                yield name, tensor
        for name, tensor in self._model.named_buffers():
            if name.startswith(prefix) and tensor.is_meta:
                yield name, tensor

    def _load(self, name: str, tied: dict[str, nn.Parameter]) -> None:
        key = weight_key(name, self._checkpoint)
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

    def _move_buffers(self, prefix: str, excluded: str | None) -> None:
        """Bring real buffers to the device; they are small, and stay there."""
        for name, buffer in self._model.named_buffers():
            inside = name.startswith(prefix) and not (excluded and name.startswith(excluded))
            if inside and not buffer.is_meta and buffer.device != self._device:
                owner, _, leaf = name.rpartition(".")
                self._model.get_submodule(owner)._buffers[leaf] = buffer.to(self._device)  # noqa: SLF001
