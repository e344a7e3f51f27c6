"""Which layers read the same input: the store says so, and they share one Hessian.

q, k and v read one tensor, and so do gate and up. A pass on the meta device, which holds no
values and costs next to nothing, shows it for any architecture. Where such a pass is impossible
(a model whose control flow asks for values), each layer that it did not reach keeps its own.
"""

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradpipe.errors import InputError
from gradpipe.stages.model.blocks import Blocks
from gradpipe.stages.model.layers import Layer
from gradpipe.stages.model.trial import attempts, image_shape


def share_inputs(model: Any, layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The layers, each with the first one of its block that reads the same input."""
    firsts = _first_readers(model, layers)
    owners = {layer.path: layer.spec for layer in layers}
    shared = []
    for layer in layers:
        owner = owners[firsts.get(layer.path, layer.path)]
        is_shared = owner.name != layer.spec.name and owner.block == layer.spec.block
        name = owner.name if is_shared else None
        shared.append(replace(layer, spec=replace(layer.spec, input_of=name)))
    return tuple(shared)


def _first_readers(model: Any, layers: Sequence[Layer]) -> dict[str, str]:
    """Path of each layer that ran -> path of the first layer with the same input."""
    on_meta = copy.deepcopy(model).to("meta")
    best: dict[str, str] = {}
    for inputs in reversed(attempts(model, 1)):  # with a ready mask first
        seen: list[tuple[Tensor, str]] = []  # tensors are held, so that no id is used twice
        handles = [_record(on_meta, layer.path, seen) for layer in layers]
        with suppress(Exception), torch.no_grad():  # what has run until then is known
            on_meta(**inputs)
        for handle in handles:
            handle.remove()
        firsts: dict[int, str] = {}
        found = {path: firsts.setdefault(id(tensor), path) for tensor, path in seen}
        best = max(best, found, key=len)
        if len(best) == len(layers):
            break
    return best


def image_tokens(model: Any, blocks: Blocks) -> int:
    """How many tokens the blocks see of an image.

    Raises InputError if a pass does not come to them, or they work on something else than tokens.
    """
    on_meta, kind, first = copy.deepcopy(model).to("meta"), type(model).__name__, blocks.paths[0]
    seen: list[tuple[Tensor, str]] = []
    handle = _record(on_meta, first, seen)
    error = ""
    try:
        with torch.no_grad():
            on_meta(pixel_values=torch.zeros(1, *image_shape(model), device="meta"))
    except Exception as raised:  # noqa: BLE001 (a model's code raises what it likes)
        says = f"{type(raised).__name__}: {str(raised).strip().partition(chr(10))[0]}"
        error = ": its code asks for values on the way" if "meta tensor" in says else f": {says}"
    handle.remove()
    if not seen:
        raise InputError(
            f"{kind}, given an image alone and without weights, does not come to its block {first}"
            f"{error}"
        )
    if seen[0][0].ndim != 3:
        raise InputError(
            f"block {first} of {kind} reads {tuple(seen[0][0].shape)}, expected (images, tokens, "
            "width): name a list of blocks that work on tokens by --blocks"
        )
    return seen[0][0].shape[1]


def _record(model: nn.Module, path: str, seen: list[tuple[Tensor, str]]) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append((inputs[0], path))

    return model.get_submodule(path).register_forward_pre_hook(hook)
