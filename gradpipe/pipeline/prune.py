"""Stage two: sparsify a checkpoint at any number of sparsities from a gradient store.

The model is never built: safetensors files stream through, one weight at a time, and everything
that is not pruned is copied byte for byte. All targets share one load and one score.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from torch import Tensor

from gradpipe.errors import GradpipeError, InputError
from gradpipe.pipeline.command import changed_options, check_regexes, recorded_command
from gradpipe.pipeline.output import LayerResult, PruneResult, publish, staging_folder, write_report
from gradpipe.pipeline.progress import QUIET, progress_bar
from gradpipe.stages.checkpoint import (
    NOT_COPIED,
    Checkpoint,
    TensorInfo,
    as_tensor,
    count_zeros,
    matrix_shape,
    tensor_bytes,
)
from gradpipe.stages.device import resolve_device
from gradpipe.stages.mask import Group, Pattern, check_pattern
from gradpipe.stages.prune import Recipe, Target, norms_on, prune_layer, rewrite
from gradpipe.stages.score import GRAD_NORMS, METHODS
from gradpipe.store.codec import Encoded
from gradpipe.store.gradients import GradientStore
from gradpipe.store.objects import digest
from gradpipe.store.schema import LayerSpec

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneConfig:
    """What to prune, by which store, how, and where to."""

    model: str  # directory, Hub id, or `embedded`
    store: str  # path or URL
    out: Path  # a folder to create; with several targets, one folder in it for each
    sparsities: tuple[float, ...] = ()  # default 0.5, unless there is a pattern
    patterns: tuple[str, ...] = ()  # n:m, n kept of every m
    method: str = "gblm"
    alpha: float = 100.0
    grad_norm: str = "l1"
    group: str = "output"
    include: tuple[str, ...] = ()  # regexes on layer names; default: every layer in the blocks
    exclude: tuple[str, ...] = ()
    device: str = "auto"
    allow_mismatch: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.method not in METHODS:
            raise InputError(f"--method {self.method}: expected one of {', '.join(METHODS)}")
        if self.grad_norm not in GRAD_NORMS:
            raise InputError(
                f"--grad-norm {self.grad_norm}: expected one of {', '.join(GRAD_NORMS)}"
            )
        if not 0 <= self.alpha < float("inf"):
            raise InputError(f"--alpha {self.alpha}: expected a finite number, 0 or more")
        for sparsity in self.sparsities:
            if not 0 <= sparsity < 1:
                raise InputError(
                    f"--sparsity {sparsity}: expected a number in [0, 1), the share to prune"
                )
        Group.parse(self.group)
        if self.patterns and self.group != "output":
            raise InputError(
                f"--group {self.group}: an n:m pattern compares within its m inputs; leave it out"
            )
        labels = [target.label for target in self.targets()]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise InputError(
                f"--sparsity or --pattern: {twice[0]} is given twice, expected different targets: "
                "leave one out"
            )
        check_regexes("--include", self.include)
        check_regexes("--exclude", self.exclude)

    def targets(self) -> tuple[Target, ...]:
        """The checkpoints to write, in order."""
        sparsities = self.sparsities or (() if self.patterns else (0.5,))
        patterns = tuple(Pattern.parse(text) for text in self.patterns)
        return (
            *(Target(sparsity) for sparsity in sparsities),
            *(Target(float(pattern.sparsity), pattern) for pattern in patterns),
        )

    def recipe(self) -> Recipe:
        """How to score and compare."""
        return Recipe(
            method=self.method,
            grad_norm=self.grad_norm,
            alpha=self.alpha,
            group=Group.parse(self.group),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What a run works on, once every check has passed."""

    config: PruneConfig
    checkpoint: Checkpoint
    store: GradientStore
    layers: dict[str, LayerSpec]  # by weight key
    device: torch.device


def prune(config: PruneConfig, console: Console = QUIET) -> tuple[PruneResult, ...]:
    """Run stage two, and return one result for each target.

    Raises InputError if model, store and options do not fit together, StoreError if the store is
    incomplete or damaged. On any error nothing is left behind.
    """
    checkpoint = Checkpoint.open(config.model)
    store = GradientStore.open(config.store)
    layers = _select_layers(config, checkpoint, store)
    device = resolve_device(config.device)
    job = _Job(config=config, checkpoint=checkpoint, store=store, layers=layers, device=device)
    with staging_folder(config.out, overwrite=config.overwrite, sources=_sources(job)) as staging:
        written = _write_weights(job, staging, console)
        results = tuple(_finish(job, target, staging, written) for target in config.targets())
        publish(staging, config.out)
    return results


def _sources(job: _Job) -> tuple[Path, ...]:
    """Folders that an output must never replace."""
    store = job.store.local_folder
    return (job.checkpoint.folder, *([] if store is None else [store]))


def _folder(job: _Job, root: Path, target: Target) -> Path:
    return root if len(job.config.targets()) == 1 else root / target.label


def _select_layers(
    config: PruneConfig, checkpoint: Checkpoint, store: GradientStore
) -> dict[str, LayerSpec]:
    """The layers to prune, by weight key, each checked against checkpoint, store and pattern."""
    candidates = {layer.weight_key: layer for layer in store.spec.layers}
    for info in checkpoint.tensors.values():
        if info.key not in candidates and info.is_matrix and info.key.endswith(".weight"):
            candidates[info.key] = _bare_spec(info)
    layers = {key: layer for key, layer in candidates.items() if _is_selected(config, layer)}
    if not layers:
        raise InputError("no layer is left to prune: check --include and --exclude")
    for layer in layers.values():
        _check_layer(config, checkpoint, store, layer)
    return layers


def _bare_spec(info: TensorInfo) -> LayerSpec:
    """A matrix that the store does not know: an embedding or a head."""
    name = info.key.removesuffix(".weight")
    return LayerSpec(
        name=name, weight_key=info.key, shape=info.shape, block=None, transposed=False, digest=""
    )


def _is_selected(config: PruneConfig, layer: LayerSpec) -> bool:
    if any(re.search(pattern, layer.name) for pattern in config.exclude):
        return False
    if config.include:
        return any(re.search(pattern, layer.name) for pattern in config.include)
    return layer.block is not None


def _check_layer(
    config: PruneConfig, checkpoint: Checkpoint, store: GradientStore, layer: LayerSpec
) -> None:
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
    if not info.is_matrix:
        raise InputError(
            f"layer {layer.name} is of type {info.dtype}: expected F16, BF16, F32 or F64 weights"
        )
    for statistic in config.recipe().statistics:
        known = statistic in store.spec.statistics
        if not known or store.spec.layer(layer.name) is None:
            include = "" if store.spec.layer(layer.name) else f" --include {layer.name}"
            wanted = ",".join(dict.fromkeys((*store.spec.statistics, statistic)))
            raise InputError(
                f"store {store.url} lacks {statistic} of layer {layer.name}, which {config.method} "
                f"needs: collect again with --statistics {wanted}{include}"
            )
    for target in config.targets():
        if target.pattern is not None:
            check_pattern(target.pattern, layer.name, layer.shape[1])


@dataclass(frozen=True, slots=True)
class _Loaded:
    """One layer read from disk, ready for the device."""

    layer: LayerSpec
    info: TensorInfo
    weight: Tensor
    encoded: dict[str, Encoded]
    matches: bool  # the weight is the one that was measured


@dataclass(frozen=True, slots=True)
class _Written:
    """What was meant to be written, to hold the files against."""

    digests: dict[tuple[str, str], str]  # (target label, weight key) -> xxh3 of the tensor
    mismatched: set[str]  # layers whose weights are not those that the store was collected from


def _write_weights(job: _Job, staging: Path, console: Console) -> _Written:
    """Write the safetensors files of every target."""
    folders = [_folder(job, staging, target) for target in job.config.targets()]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    written = _Written({}, set())
    with progress_bar(console, "pruning", len(job.layers), "layers") as advance:
        for file in job.checkpoint.files:
            infos = sorted(
                (job.checkpoint.tensors[key] for key in job.layers), key=lambda info: info.start
            )
            here = [info for info in infos if info.file == file]
            loads = [lambda info=info: _load(job, info) for info in here]
            replaced = _pruned(job, _prefetched(loads), written, advance)
            outputs = [folder / file for folder in folders]
            rewrite(job.checkpoint.folder / file, outputs, replaced)
    return written


def _pruned(
    job: _Job, loaded: Iterable[_Loaded], written: _Written, advance: Callable[[int], None]
) -> Iterator[tuple[TensorInfo, Iterable[Tensor]]]:
    recipe, targets = job.config.recipe(), job.config.targets()
    for item in loaded:
        if not item.matches:
            _refuse_mismatch(job, item.layer)
            written.mismatched.add(item.layer.name)
        norms = norms_on(item.encoded, job.device)
        weight = item.weight.to(job.device)
        name, transposed = item.layer.name, item.layer.transposed
        tensors = prune_layer(name, weight, norms, recipe, targets, transposed=transposed)
        yield item.info, _digested(tensors, targets, item.info.key, written)
        advance(1)


def _digested(
    tensors: Iterable[Tensor], targets: Sequence[Target], key: str, written: _Written
) -> Iterator[Tensor]:
    for target, tensor in zip(targets, tensors, strict=True):
        written.digests[target.label, key] = digest(tensor_bytes(tensor))
        yield tensor


def _load(job: _Job, info: TensorInfo) -> _Loaded:
    layer = job.layers[info.key]
    data = job.checkpoint.read_bytes(info.key)
    statistics = job.config.recipe().statistics
    return _Loaded(
        layer=layer,
        info=info,
        weight=as_tensor(data, info),
        encoded=job.store.read(layer, statistics),
        matches=layer.digest in ("", digest(data)),
    )


def _refuse_mismatch(job: _Job, layer: LayerSpec) -> None:
    if not job.config.allow_mismatch:
        raise InputError(
            f"layer {layer.name}: its weights in {job.config.model} are not those that the store "
            f"{job.store.url} was collected from: collect again, or --allow-mismatch"
        )


def _prefetched(loads: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results in order, the next one being loaded while the caller works on this one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = None
        for load in loads:
            following = pool.submit(load)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def _finish(job: _Job, target: Target, staging: Path, written: _Written) -> PruneResult:
    """Copy what is not weights, read the weights back, and write the report."""
    folder = _folder(job, staging, target)
    for path in sorted(job.checkpoint.folder.iterdir()):
        if path.is_file() and not path.name.endswith(NOT_COPIED):
            shutil.copyfile(path, folder / path.name)
    result = PruneResult(
        folder=_folder(job, job.config.out, target),
        label=target.label,
        layers=tuple(_read_back(job, target, folder, written)),
    )
    write_report(folder, _report(job, target, written.mismatched), result)
    return result


def _read_back(job: _Job, target: Target, folder: Path, written: _Written) -> Iterator[LayerResult]:
    """Count the zeros that are really in the written file."""
    checkpoint = Checkpoint.open(str(folder))
    for key, layer in sorted(job.layers.items()):
        data = checkpoint.read_bytes(key)
        if digest(data) != written.digests[target.label, key]:
            raise GradpipeError(
                f"layer {layer.name} reads back from {folder} otherwise than it was written"
            )
        yield LayerResult(
            name=layer.name,
            requested=float(target.exact),
            zeros=count_zeros(as_tensor(data, checkpoint.tensors[key])),
            size=layer.shape[0] * layer.shape[1],
        )


def _report(job: _Job, target: Target, mismatched: set[str]) -> dict[str, object]:
    """What was done, for `pruning.json`: the same whether or not other targets ran beside it."""
    config = job.config
    leave_out = {"model", "store", "out", "sparsities", "patterns", "overwrite", "device"}
    pattern = None if target.pattern is None else str(target.pattern)
    goal = {"pattern": pattern} if pattern else {"sparsity": target.sparsity}
    options = changed_options(config, leave_out) | {"method": config.method} | goal
    return {
        "model": job.checkpoint.label,
        "revision": job.checkpoint.revision,
        "store": job.store.digest,
        "method": config.method,
        "statistics": list(config.recipe().statistics),
        "alpha": config.alpha,
        "grad_norm": config.grad_norm,
        "group": config.group,
        "pattern": pattern or "unstructured",
        "mismatched_layers": sorted(mismatched),
        "command": recorded_command("prune", (job.checkpoint.label, "STORE", "OUT"), options),
    }
