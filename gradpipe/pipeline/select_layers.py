"""Which layers are pruned, each checked against the checkpoint, the store and the options."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from gradpipe.errors import InputError
from gradpipe.pipeline.prune_config import PruneConfig
from gradpipe.stages.checkpoint import Checkpoint, check_type, matrix_shape
from gradpipe.stages.mask import check_pattern
from gradpipe.store.gradients import GradientStore
from gradpipe.store.schema import LayerSpec

_PLAIN = ("none", "input", "uniform")  # values of options that ask for nothing


def select_layers(
    config: PruneConfig, checkpoint: Checkpoint, store: GradientStore
) -> dict[str, LayerSpec]:
    """The layers to prune, by weight key, each checked against checkpoint, store and pattern."""
    candidates = {layer.weight_key: layer for layer in store.spec.layers}
    blocks = {_list_of(x.name) for x in store.spec.layers if x.block is not None}
    for info in checkpoint.tensors.values():
        is_bare = info.key not in candidates and info.is_matrix and info.key.endswith(".weight")
        if is_bare and _list_of(info.key) not in blocks:  # an embedding or a head, not a router
            candidates[info.key] = checkpoint.layer_spec(info.key, block=None)
    _check_patterns(config, [layer.name for layer in candidates.values()])
    layers = {key: layer for key, layer in candidates.items() if _is_selected(config, layer)}
    if not layers:
        raise InputError("no layer is left to prune: check --include and --exclude")
    for layer in layers.values():
        _check_tensor(config, checkpoint, store, layer)
    _check_statistics(config, store, layers.values())
    for target in config.targets():
        for layer in layers.values():
            if target.pattern is not None:
                check_pattern(target.pattern, layer.name, layer.shape[1])
    return layers


def _check_patterns(config: PruneConfig, names: Sequence[str]) -> None:
    """A regex that matches nothing is a slip of the pen, and would prune what was to stay."""
    for flag, patterns in (("include", config.include), ("exclude", config.exclude)):
        for pattern in patterns:
            if not any(re.search(pattern, name) for name in names):
                raise InputError(
                    f"--{flag} {pattern}: matches no layer of {config.model}, which has such as "
                    f"{names[0]}"
                )


def _list_of(name: str) -> str | None:
    """The list of blocks that a name is in: `model.layers` for `model.layers.0.mlp.gate`."""
    found = re.match(r"(.+?)\.\d+\.", name)
    return found[1] if found else None


def _is_selected(config: PruneConfig, layer: LayerSpec) -> bool:
    if any(re.search(pattern, layer.name) for pattern in config.exclude):
        return False
    if config.include:
        return any(re.search(pattern, layer.name) for pattern in config.include)
    return layer.block is not None


def _check_tensor(
    config: PruneConfig, checkpoint: Checkpoint, store: GradientStore, layer: LayerSpec
) -> None:
    """The checkpoint has this layer, and in a shape and type that can be pruned."""
    info = checkpoint.tensors.get(layer.weight_key)
    if info is None:
        raise InputError(
            f"store {store.url} is of another model ({store.spec.model.name}): "
            f"{config.model} has no {layer.weight_key}"
        )
    shape = matrix_shape(info, transposed=layer.transposed)
    if shape != layer.shape:
        raise InputError(
            f"store {store.url} is of another model ({store.spec.model.name}): layer {layer.name} "
            f"is {layer.shape} there, {shape} in {config.model}"
        )
    check_type(layer.name, info)


def _check_statistics(
    config: PruneConfig, store: GradientStore, layers: Iterable[LayerSpec]
) -> None:
    """The store holds what the options read of each layer."""
    collected = {layer.name for layer in store.spec.layers}
    needed = config.statistics
    lacking = [name for name in needed if name not in store.spec.statistics]
    for layer in layers:
        if needed and (lacking or layer.name not in collected):
            include = "" if layer.name in collected else f" --include {layer.name}"
            statistic = (*lacking, *needed)[0]
            wanted = ",".join(dict.fromkeys((*store.spec.statistics, *lacking)))
            raise InputError(
                f"store {store.url} lacks {statistic} of layer {layer.name}, which {_wish(config)} "
                f"needs: collect again with --statistics {wanted}{include}"
            )


def _wish(config: PruneConfig) -> str:
    """What asked for a statistic, as the user named it."""
    extras = {
        "update": config.update,
        "curvature": config.curvature,
        "allocation": config.allocation,
    }
    named = [f"--{flag} {value}" for flag, value in extras.items() if value not in _PLAIN]
    return " with ".join([config.score or config.method, *named])
