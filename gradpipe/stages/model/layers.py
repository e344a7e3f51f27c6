"""A model taken apart: its blocks, and the prunable layers in them.

No table of architectures: the blocks are the module list that holds most of the model's
parameters, and a layer is a linear map inside one. `--blocks` names the list by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from gradpipe.errors import InputError
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.model.tensor_names import weight_keys
from gradpipe.store.objects import digest
from gradpipe.store.schema import CouplingSpec, LayerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One prunable linear map of a model."""

    path: str  # of its module in the model, whichever instance of it
    spec: LayerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The repeated blocks of a model, in order: where they are, whichever instance of it."""

    path: str  # of their list: `model.layers`
    count: int

    @property
    def paths(self) -> tuple[str, ...]:
        """The path of each block's module, such as `model.layers.0`."""
        return tuple(f"{self.path}.{index}" for index in range(self.count))


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """A checkpoint's model without its weights, taken apart."""

    checkpoint: Checkpoint
    model: Any  # on the meta device, its buffers real
    blocks: Blocks
    layers: tuple[Layer, ...]
    couplings: tuple[CouplingSpec, ...] = ()  # as far as they were asked for


def find_blocks(model: nn.Module, path: str | None = None) -> Blocks:
    """The repeated blocks: those at `path`, else the largest list of modules of one class.

    Raises InputError that says what was looked for.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and _is_block_list(module)
    }
    if path is not None:
        if path not in lists:
            raise InputError(
                f"--blocks {path}: expected the path of a list of blocks with linear layers; "
                f"this model has {', '.join(lists) or 'none'}"
            )
        return Blocks(path=path, count=len(lists[path]))
    if not lists:
        raise InputError(
            f"no blocks found in {type(model).__name__}: looked for an nn.ModuleList whose "
            "modules share one class and hold linear layers; name its path with --blocks PATH"
        )
    largest = max(lists, key=lambda name: _num_parameters(lists[name]))
    return Blocks(path=largest, count=len(lists[largest]))


def find_layers(
    model: nn.Module,
    blocks: Blocks,
    checkpoint: Checkpoint,
    include: tuple[str, ...] = (),
) -> tuple[Layer, ...]:
    """Every linear map in the blocks, and those outside whose name matches an `include` regex.

    Each is tied to its tensor in the checkpoint, whose digest is not known yet: see `measured`.
    Raises InputError for one that has none, and for a regex without a match.
    """
    prefix = blocks.path + "."
    keys = weight_keys(model, checkpoint)
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    outside = {name: keys[f"{name}.weight"] for name in linears if not name.startswith(prefix)}
    included = {name for pattern in include for name in _matches(pattern, outside, checkpoint)}
    layers = []
    for name, module in linears.items():
        inside = name.startswith(prefix)
        if inside or name in included:
            block = int(name.removeprefix(prefix).split(".")[0]) if inside else None
            transposed = isinstance(module, Conv1D)
            spec = checkpoint.layer_spec(keys[f"{name}.weight"], block, transposed=transposed)
            layers.append(Layer(path=name, spec=spec))
    return tuple(layers)


def measured(layers: Iterable[Layer], checkpoint: Checkpoint) -> tuple[Layer, ...]:
    """The layers with the digests of their weights, all of which are read."""
    return tuple(
        replace(x, spec=replace(x.spec, digest=digest(checkpoint.read_bytes(x.spec.weight_key))))
        for x in layers
    )


def _matches(pattern: str, outside: dict[str, str], checkpoint: Checkpoint) -> list[str]:
    """The modules meant by an `include` regex, by their own name or their tensor's."""
    found = [
        name
        for name, key in outside.items()
        if re.search(pattern, name) or re.search(pattern, key.removesuffix(".weight"))
    ]
    if not found:
        raise InputError(
            f"--include {pattern}: matches no linear layer outside the blocks; "
            f"{checkpoint.name} has {', '.join(outside) or 'none'}"
        )
    return found


def is_linear(module: nn.Module) -> bool:
    """True for the modules whose `weight` is one matrix applied to the last dimension."""
    return isinstance(module, nn.Linear | Conv1D)


def _is_block_list(modules: nn.ModuleList) -> bool:
    kinds = {type(module) for module in modules}
    return len(kinds) == 1 and any(is_linear(m) for m in modules[0].modules())


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
