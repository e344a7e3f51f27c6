"""The prunable layers of a model, and what of its blocks is left dense, with the reason.

A layer is a linear map in the blocks, or one outside that is asked for, whose matrix is a tensor of
the checkpoint. Routers stay dense: a few thousand weights decide where every token goes.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from gradpipe.errors import InputError, did_you_mean, steps_of
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.checkpoint.tensors import owners
from gradpipe.stages.model.blocks import Blocks
from gradpipe.stages.model.conversion import Sources
from gradpipe.stages.model.experts import InCheckpoint, RoutedLinear
from gradpipe.stages.model.trial import Trial
from gradpipe.store.objects import digest
from gradpipe.store.schema import LayerSpec

_ROUTER = re.compile(r"router|(^|\.)(gate|gating|wg|\w*expert_gate)(\.|$)")  # beside experts
_TOLD = 4  # names of layers in an error
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One prunable linear map of a model."""

    path: str  # of its module in the model, whichever instance of it
    spec: LayerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A matrix of the blocks, or a stack of them, that is no layer."""

    name: str  # of the parameter in the model
    num_weights: int
    reason: str


def find_layers(
    model: nn.Module,
    linears: dict[str, nn.Module],
    blocks: Blocks,
    sources: Sources,
    trial: Trial,
    include: Sequence[str],
    exclude: Sequence[str],
) -> tuple[tuple[Layer, ...], tuple[LeftOut, ...]]:
    """Every linear map in the blocks, and those outside that are asked for; what is left out.

    Regexes `include` linear maps outside the blocks, and `exclude` some that are left dense.
    Raises InputError for a regex without a match, for weights that are no floats, and for a model
    in which nothing is a layer.
    """
    prefix = blocks.path + "."
    keys = {name: _key(name, module, sources) for name, module in linears.items()}
    reasons = _reasons(model, linears, keys, sources, trial)
    outside = [x for x in linears if not x.startswith(prefix)]
    wanted = [x for x in linears if x.startswith(prefix)]
    for pattern in include:
        included = _matches("include", pattern, outside, keys, sources)
        if all(name in reasons for name in included):
            first = included[0]
            raise InputError(f"--include {pattern}: {first} is no layer: {reasons[first]}")
        wanted += included
    for pattern in exclude:
        for name in _matches("exclude", pattern, wanted, keys, sources):
            reasons[name] = f"left out by --exclude {pattern}"
    layers, chosen = [], set(wanted) - reasons.keys()  # of experts there are thousands
    for name, module in linears.items():
        key = keys[name]
        if name in chosen and key is not None:
            place = InCheckpoint(key=key, transposed=isinstance(module, Conv1D))
            if isinstance(module, RoutedLinear):
                place = module.place
            spec = sources.checkpoint.layer_spec(
                key, blocks.index(name), transposed=place.transposed, part=place.part
            )
            layers.append(Layer(path=name, spec=spec))
    if not layers:
        raise InputError(_none(sources.checkpoint, blocks, wanted, reasons))
    return tuple(layers), _left_out(model, blocks, linears, reasons)


def _none(
    checkpoint: Checkpoint, blocks: Blocks, wanted: list[str], reasons: dict[str, str]
) -> str:
    """What to say where nothing is a layer: the first linear map's reason."""
    first = next((f": {x}: {reasons[x]}" for x in wanted if x in reasons), "")
    return (
        f"{checkpoint.name}: none of the {len(wanted)} linear maps in {blocks.path} can be pruned"
        f"{first}: name other blocks by --blocks"
    )


def share_inputs(layers: tuple[Layer, ...], trial: Trial) -> tuple[Layer, ...]:
    """The layers, each with the first one of its block that reads the same input.

    q, k and v read one tensor, and so do gate and up: they share one Hessian. Where the trial did
    not come to a layer, it keeps its own.
    """
    specs = {layer.path: layer.spec for layer in layers}
    first: dict[str, LayerSpec] = {}
    owners = {x: first.setdefault(y, specs[x]) for x, y in trial.reads.items() if x in specs}
    shared = []
    for layer in layers:
        owner = owners.get(layer.path, layer.spec)
        is_shared = owner.name != layer.spec.name and owner.block == layer.spec.block
        name = owner.name if is_shared else None
        shared.append(replace(layer, spec=replace(layer.spec, input_of=name)))
    return tuple(shared)


def measured(layers: Iterable[Layer], checkpoint: Checkpoint) -> tuple[Layer, ...]:
    """The layers with the digests of their weights, all of which are read."""

    def own(layer: Layer) -> str:
        return digest(checkpoint.read_place(checkpoint.place(layer.spec)))

    return tuple(replace(x, spec=replace(x.spec, digest=own(x))) for x in layers)


def dense_lines(left_out: tuple[LeftOut, ...]) -> list[str]:
    """What stays dense, in a line for each reason."""
    by_reason: dict[str, list[LeftOut]] = {}
    for item in left_out:
        by_reason.setdefault(item.reason, []).append(item)
    return [
        f"stays dense: {items[0].name}"
        + (f" and {len(items) - 1} more" if len(items) > 1 else "")
        + f", {sum(x.num_weights for x in items):,} weights: {reason}"
        for reason, items in by_reason.items()
    ]


def _key(name: str, module: nn.Module, sources: Sources) -> str | None:
    """The checkpoint's tensor that a linear map's matrix is; None if it is made from others."""
    return module.place.key if isinstance(module, RoutedLinear) else sources.key(f"{name}.weight")


def _reasons(
    model: nn.Module,
    linears: dict[str, nn.Module],
    keys: dict[str, str | None],
    sources: Sources,
    trial: Trial,
) -> dict[str, str]:
    """Why linear maps are no layers, for those that are none."""
    mixtures, is_known = _mixtures(model), trial.error is None
    names = Counter(source.keys[0] for source in sources.by_name.values() if source.rule is None)
    reasons = {}
    for path, module in linears.items():
        key, times = keys[path], trial.times.get(path, 0)
        if key is None:
            reasons[path] = "made from other tensors of the checkpoint"
        elif _is_router(path, module, mixtures):
            reasons[path] = "a router or gate of experts"
        elif names[key] > 1:
            reasons[path] = "its tensor is used by several modules"
        elif times > 1:
            reasons[path] = f"called {times} times by a pass over a sample"
        elif path in trial.mixed and not isinstance(module, RoutedLinear):
            reasons[path] = "what it reads does not lie sample by sample"
        elif is_known and not times:
            reasons[path] = "not called by a pass over a sample"
        elif is_known and _weight_name(path, module) not in trial.reached:
            reasons[path] = "no gradient comes to it: what it gives is only compared, or not used"
    return reasons


def _weight_name(path: str, module: nn.Module) -> str:
    """The parameter that a linear map's matrix is, or is a part of."""
    if isinstance(module, RoutedLinear):
        return module.stack.path
    return f"{path}.weight"


def _mixtures(model: nn.Module) -> set[str]:
    """Paths of what holds experts, however deep."""
    experts = [
        name
        for name, parameter in model.named_parameters()
        if ".experts." in f".{name}"
        or (parameter.ndim == 3 and not isinstance(_owner(model, name), _CONVOLUTIONS))
    ]
    return {owner for name in experts for owner in owners(name)}


def _owner(model: nn.Module, parameter: str) -> nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])


def _is_router(name: str, module: Any, mixtures: set[str]) -> bool:
    """True for a linear map beside experts that bears a router's name, or has one output."""
    if isinstance(module, RoutedLinear):
        return False
    beside = [owner for owner in owners(name) if owner in mixtures]
    is_gate = bool(_ROUTER.search(name)) or module.weight.shape[0] == 1
    return bool(beside) and is_gate


def _matches(
    option: str,
    pattern: str,
    names: list[str],
    keys: dict[str, str | None],
    sources: Sources,
) -> list[str]:
    """The modules meant by a regex, by their own name or their tensor's."""
    tensors = {name: (keys[name] or name).removesuffix(".weight") for name in names}
    found = [x for x in names if re.search(pattern, x) or re.search(pattern, tensors[x])]
    if not found:
        where = "outside the blocks" if option == "include" else "that is collected"
        raise InputError(
            f"--{option} {pattern}: matches no linear layer {where}; {sources.checkpoint.name} "
            f"has {_some(names)}{did_you_mean(pattern, steps_of(names))}"
        )
    return found


def _some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    return (", ".join(names[:_TOLD]) or "none") + more


def _left_out(
    model: nn.Module, blocks: Blocks, linears: dict[str, nn.Module], reasons: dict[str, str]
) -> tuple[LeftOut, ...]:
    """The parameters of the blocks, of two dimensions or more, that are no layer's.

    And of linear maps outside that could be none: a tower that reads images, where text is run.
    """
    layers = {_weight_name(x, module) for x, module in linears.items() if x not in reasons}
    found = []
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        is_meant = name.startswith(f"{blocks.path}.") or owner in reasons
        if is_meant and parameter.ndim >= 2 and name not in layers:
            reason = reasons.get(owner) or _kind(name, parameter.ndim, _owner(model, name))
            found.append(LeftOut(name=name, num_weights=parameter.numel(), reason=reason))
    return tuple(found)


def _kind(name: str, ndim: int, owner: nn.Module) -> str:
    """What a parameter is that is no linear map's."""
    if isinstance(owner, _CONVOLUTIONS):
        return "a convolution"
    if isinstance(owner, nn.Embedding):
        return "an embedding"
    if isinstance(owner, nn.Linear):
        return f"{type(owner).__name__} computes something else than a product with its weight"
    if name.endswith("bias"):
        return "a bias"
    if ndim == 3 or ".experts." in name:
        return "several experts in one tensor"
    return f"a parameter of {type(owner).__name__}"
