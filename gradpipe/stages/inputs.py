"""Which layers read the same input: they share one Hessian.

q, k and v read one tensor, and so do gate and up. A pass on the meta device, which holds no
values and costs next to nothing, shows it for any architecture. Where such a pass is impossible
(a model whose control flow asks for values), each layer that it did not reach keeps its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradpipe.stages.model import Layer

_TOKENS = 4


def share_hessians(model: Any, layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The layers, each with the first one of its block that reads the same input."""
    firsts = _first_readers(model, layers)
    owners = {layer.path: layer.spec for layer in layers}
    shared = []
    for layer in layers:
        owner = owners[firsts.get(layer.path, layer.path)]
        is_shared = owner.name != layer.spec.name and owner.block == layer.spec.block
        name = owner.name if is_shared else None
        shared.append(replace(layer, spec=replace(layer.spec, hessian_of=name)))
    return tuple(shared)


def _first_readers(model: Any, layers: Sequence[Layer]) -> dict[str, str]:
    """Path of each layer that ran -> path of the first layer with the same input."""
    on_meta = copy.deepcopy(model).to("meta")
    best: dict[str, str] = {}
    for extra in _attempts():
        seen: list[tuple[Tensor, str]] = []  # tensors are held, so that no id is used twice
        handles = [_record(on_meta, layer.path, seen) for layer in layers]
        with suppress(Exception), torch.no_grad():  # what has run until then is known
            ids_BT = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
            on_meta(input_ids=ids_BT, use_cache=False, **extra)
        for handle in handles:
            handle.remove()
        firsts: dict[int, str] = {}
        found = {path: firsts.setdefault(id(tensor), path) for tensor, path in seen}
        best = max(best, found, key=len)
    return best


def _attempts() -> tuple[Mapping[str, Tensor], ...]:
    """Most models need a ready mask not to look into it; a few build theirs without looking."""
    return ({"attention_mask": torch.zeros(1, 1, _TOKENS, _TOKENS, device="meta")}, {})


def _record(model: nn.Module, path: str, seen: list[tuple[Tensor, str]]) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append((inputs[0], path))

    return model.get_submodule(path).register_forward_pre_hook(hook)
