"""Which layers are pruned, each checked against the checkpoint, the store and the options."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product

from gradpipe.errors import InputError, did_you_mean, steps_of
from gradpipe.pipeline.prune.config import PruneConfig
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.checkpoint.layer_names import list_of
from gradpipe.stages.checkpoint.tensors import TensorInfo, check_type, matrix_shape, owners
from gradpipe.stages.prune.target import Target
from gradpipe.store.reader import GradientStore
from gradpipe.store.schema import LayerSpec
from gradpipe.store.statistics import STATISTICS, is_of_activations

_PLAIN = ("none", "input", "uniform")  # values of options that ask for nothing
_SEQUENTIAL_HEAD = re.compile(r"\w+\.\d+\.weight")  # `classifier.0.weight`
_HEADS = ("lm_head", "embed_out")  # as transformers names them


def select_layers(
    config: PruneConfig, checkpoint: Checkpoint, store: GradientStore
) -> dict[str, LayerSpec]:
    """The layers to prune, by name; InputError if none is left, or one is tied to another."""
    candidates = {layer.name: layer for layer in store.spec.layers}
    measured = {layer.weight_key for layer in store.spec.layers}
    towers = _towers(checkpoint, store)
    for info in checkpoint.tensors.values():
        is_bare = info.key not in measured and info.is_matrix and info.key.endswith(".weight")
        is_apart = list_of(info.key) is None and towers.isdisjoint(owners(info.key))
        if is_bare and (is_apart or _SEQUENTIAL_HEAD.fullmatch(info.key)):  # an embedding, a head
            layer = checkpoint.layer_spec(info.key, block=None)
            candidates[layer.name] = layer
    _check_patterns(config, checkpoint, [*candidates.values()])
    layers = {name: layer for name, layer in candidates.items() if _is_selected(config, layer)}
    if not layers:
        raise InputError("no layer is left to prune: check --include and --exclude")
    _check_tied(checkpoint, [*candidates.values()], layers)
    return layers


def _check_patterns(
    config: PruneConfig, checkpoint: Checkpoint, candidates: Sequence[LayerSpec]
) -> None:
    """A regex that matches nothing is a slip of the pen, and would prune what was to stay."""
    for flag, patterns in (("include", config.include), ("exclude", config.exclude)):
        for pattern in patterns:
            if any(re.search(pattern, layer.name) for layer in candidates):
                continue
            embedding = _embedding(checkpoint, candidates)
            if embedding and any(re.search(pattern, head) for head in _HEADS):
                raise InputError(
                    f"--{flag} {pattern}: the head of {config.model} is tied to {embedding}: give "
                    f"--{flag} {embedding}"
                )
            near = did_you_mean(pattern, steps_of(x.name for x in candidates))
            raise InputError(
                f"--{flag} {pattern}: matches no layer of {config.model}, which has such as "
                f"{candidates[0].name}{near}"
            )


def _embedding(checkpoint: Checkpoint, candidates: Sequence[LayerSpec]) -> str | None:
    """The layer with a row for each token, where the head may be tied to it."""
    if not _may_tie(checkpoint):
        return None
    size = checkpoint.config.get("vocab_size")
    return next((x.name for x in candidates if x.block is None and x.shape[0] == size), None)


def _may_tie(checkpoint: Checkpoint) -> bool:
    """True unless `config.json` denies it: some models' default is to tie."""
    return checkpoint.config.get("tie_word_embeddings") is not False


def _check_tied(
    checkpoint: Checkpoint, candidates: Sequence[LayerSpec], layers: Mapping[str, LayerSpec]
) -> None:
    """An embedding and a head that are equal are one matrix to transformers, if it ties them."""
    outside = [x for x in candidates if x.block is None and x.weight_key in checkpoint.tensors]
    chosen = [x for x in outside if x.name in layers]
    for one, other in product(chosen, outside) if _may_tie(checkpoint) else ():
        if other.name in layers or other.shape != one.shape:
            continue
        if checkpoint.read_bytes(one.weight_key) == checkpoint.read_bytes(other.weight_key):
            raise InputError(
                f"layers {one.name} and {other.name} of {checkpoint.name} are tied, and equal: "
                f"prune both, with --include {other.name} as well, or neither"
            )


def _towers(checkpoint: Checkpoint, store: GradientStore) -> set[str]:
    """What holds a list of blocks that the store has nothing of, and none that it has.

    Such is a vision tower, with its head, and a head that predicts further tokens.
    """
    measured = {
        owner for x in store.spec.layers if x.block is not None for owner in owners(x.weight_key)
    }
    lists = {path for key in checkpoint.tensors if (path := list_of(key)) is not None}
    return {owner for path in lists for owner in owners(f"{path}.0")} - measured


def _is_selected(config: PruneConfig, layer: LayerSpec) -> bool:
    if any(re.search(pattern, layer.name) for pattern in config.exclude):
        return False
    if config.include:
        return any(re.search(pattern, layer.name) for pattern in config.include)
    return layer.block is not None


def place_of(
    config: PruneConfig, checkpoint: Checkpoint, store: GradientStore, layer: LayerSpec
) -> TensorInfo:
    """Where a layer's weights lie in the checkpoint's files.

    Raises InputError if they are not there, or not in a shape and type that can be pruned.
    """
    another = f"store {store.url} is of another model ({store.spec.model.name}): "
    if layer.weight_key not in checkpoint.tensors:
        raise InputError(f"{another}{config.model} has no {layer.weight_key}")
    info = checkpoint.place(layer)
    shape = matrix_shape(info, transposed=layer.transposed)
    if shape != layer.shape:
        raise InputError(
            f"{another}layer {layer.name} is {layer.shape} there, {shape} in {config.model}"
        )
    check_type(layer.name, info)
    return info


def check_widths(layers: Iterable[LayerSpec], targets: Iterable[Target]) -> None:
    """Each layer divides into the groups of each pattern; InputError for one that does not."""
    patterns = [target.pattern for target in targets if target.pattern is not None]
    for pattern, layer in product(patterns, layers):
        if layer.shape[1] % pattern.m:
            raise InputError(
                f"pattern {pattern}: layer {layer.name} has {layer.shape[1]} inputs, not divisible "
                f"by {pattern.m}: --exclude it or choose another pattern"
            )


def check_statistics(
    config: PruneConfig,
    store: GradientStore,
    layers: Iterable[LayerSpec],
    needed: Sequence[str],
) -> None:
    """The store holds what the options read of each layer; InputError if not: how to get it."""
    collected = {layer.name for layer in store.spec.layers}
    lacking = [name for name in needed if name not in store.spec.statistics]
    for layer in layers:
        if needed and (lacking or layer.name not in collected):
            statistic = (*lacking, *needed)[0]
            raise InputError(
                f"store {store.url} lacks {statistic} of layer {layer.name}, which {_wish(config)} "
                f"needs: {_remedy(store, layer, lacking, is_collected=layer.name in collected)}"
            )


def _remedy(
    store: GradientStore, layer: LayerSpec, lacking: Sequence[str], *, is_collected: bool
) -> str:
    """How to get statistics that a store lacks."""
    if lacking and store.spec.samples.sampling == "imported" and (by := _import_of(lacking[0])):
        return f"import again with import-gblm {by}"
    wanted = ",".join(dict.fromkeys((*store.spec.statistics, *lacking)))
    collect = f"collect again with --statistics {wanted}"
    if is_collected:
        return collect
    return (
        f"{collect} --include {layer.name}; an embedding has no statistics: --method magnitude "
        "alone prunes it"
    )


def _import_of(statistic: str) -> str | None:
    """What brings a statistic into an imported store, None if nothing does."""
    if file := STATISTICS[statistic].gblm_file:
        return f"--{file} FILE"
    return "--activations STORE" if is_of_activations(statistic) else None


def _wish(config: PruneConfig) -> str:
    """What asked for a statistic, as the user named it."""
    extras = {
        "update": config.update,
        "curvature": config.curvature,
        "allocation": config.allocation,
    }
    named = [f"--{flag} {value}" for flag, value in extras.items() if value not in _PLAIN]
    return " with ".join([config.score or config.method, *named])
