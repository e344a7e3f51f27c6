"""Stage two: sparsify a checkpoint at any number of sparsities from a gradient store.

The model is never built: safetensors files stream through, one weight at a time, and everything
that is not pruned is copied byte for byte. All targets share one load and one score.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from torch import Tensor

from gradpipe.errors import GradpipeError
from gradpipe.pipeline.allocation import Budgets, own_target
from gradpipe.pipeline.command import changed_options, recorded_command
from gradpipe.pipeline.destination import REPORT, check_out
from gradpipe.pipeline.output import LayerResult, PruneResult, write_report
from gradpipe.pipeline.progress import QUIET, progress_bar
from gradpipe.pipeline.prune_config import PruneConfig
from gradpipe.pipeline.prune_files import PruneJob, Written, score_of, write_file
from gradpipe.pipeline.select_layers import select_layers
from gradpipe.pipeline.staging import SharedStaging, Staging
from gradpipe.stages.checkpoint import (
    Checkpoint,
    as_tensor,
    count_zeros,
)
from gradpipe.stages.device import resolve_device
from gradpipe.stages.prune import Budget, Target
from gradpipe.stages.score import METHODS
from gradpipe.store.gradients import GradientStore
from gradpipe.store.objects import digest
from gradpipe.store.partial import Shard
from gradpipe.store.schema import LayerSpec

Layers = dict[str, LayerSpec]  # by weight key


def prune(config: PruneConfig, console: Console = QUIET) -> tuple[PruneResult, ...]:
    """Run stage two, and return one result for each target.

    As one of several shards, rewrite a share of the checkpoint's files; the one that completes
    them publishes the output, the others return nothing. Raises InputError if model, store and
    options do not fit together, StoreError if the store is incomplete or damaged. On any error
    nothing is left behind, but for what other shards need.
    """
    checkpoint = Checkpoint.open(config.model)
    store = GradientStore.open(config.store)
    layers = select_layers(config, checkpoint, store)
    unseen = frozenset(
        key for key, layer in layers.items() if config.statistics and store.is_unseen(layer)
    )
    job = PruneJob(
        checkpoint=checkpoint,
        store=store,
        layers=layers,
        procedure=config.procedure(),
        targets=config.targets() or (own_target(Path(config.allocation), _seen(layers, unseen)),),
        allocation=config.shares(),
        allow_mismatch=config.allow_mismatch,
        device=resolve_device(config.device),
        unseen=unseen,
    )
    if config.shard is not None:
        return _prune_shard(config, job, config.shard, console)
    staging = Staging(config.out, lambda: _check_out(config, job))
    staging.check()
    _verify(job)
    with staging.begun():
        job = replace(job, budgets=_budgets(config, job, console))
        written = Written()
        with progress_bar(console, "pruning", len(job.layers), "layers") as advance:
            for file in checkpoint.files:
                written.add(write_file(job, file, staging.folder, advance))
        results = _finish(config, job, staging.folder, written)
        staging.publish()
    _say(job, written, console)
    return results


def _check_out(config: PruneConfig, job: PruneJob) -> None:
    """Raises InputError if the output may not be written."""
    local = job.store.local_folder
    sources = (job.checkpoint.folder, *([local] if local else []))
    check_out(config.out, overwrite=config.overwrite, sources=sources)


def _verify(job: PruneJob) -> None:
    """Verify a local store before a weight is written; a remote one is verified as it is read."""
    if job.store.local_folder is not None:
        job.store.verify()


def _say(job: PruneJob, written: Written, console: Console) -> None:
    """What the user should know of a run that went well."""
    missed = (note for target in job.targets for note in _missed(job, target))
    for note in (*missed, *sorted(written.notes)):
        console.print(note, highlight=False)
    if job.unseen:
        console.print(
            f"{len(job.unseen)} layers that no calibration token reached are pruned by magnitude; "
            "pruning.json lists them: collect with more samples to score them",
            highlight=False,
        )
    if job.allocation.kind != "uniform" and not job.allocation.mixes_patterns:
        for target in job.targets:
            if target.pattern is not None:
                console.print(
                    f"{target.pattern} in every block, whatever the allocation: --mixed-patterns "
                    "lets it choose",
                    highlight=False,
                )


def _missed(job: PruneJob, target: Target) -> list[str]:
    """A line if mixed patterns do not meet their target: blocks of several sizes may not add up."""
    if target.pattern is None or not job.budgets:
        return []
    total = sum(layer.num_weights for layer in job.layers.values())
    pruned = sum(job.budget(target, key).sparsity * x.num_weights for key, x in job.layers.items())
    if pruned == target.budget.sparsity * total:
        return []
    note = (
        f"{target.pattern} mixed by block prunes {float(pruned / total):.2%} of the weights, not "
        f"{float(target.budget.sparsity):.2%}: the blocks' sizes do not add up to it"
    )
    return [note]


def _budgets(config: PruneConfig, job: PruneJob, console: Console) -> list[Budgets]:
    """How much of each layer goes, by target; the target's own share where nothing was seen."""
    uniform = [dict.fromkeys(job.layers, target.budget) for target in job.targets]
    if len(job.unseen) == len(job.layers):
        return uniform
    shared = _shared(config, job, _seen(job.layers, job.unseen), console)
    return [whole | part for whole, part in zip(uniform, shared, strict=True)]


def _seen(layers: Layers, unseen: frozenset[str]) -> Layers:
    """The layers that tokens reached; all if they reached none."""
    return {key: layer for key, layer in layers.items() if key not in unseen} or layers


def _shared(config: PruneConfig, job: PruneJob, seen: Layers, console: Console) -> list[Budgets]:
    """What the allocation gives layers that were seen."""
    score = config.shares_score()
    if score is None:
        return job.allocation.budgets(seen, job.targets, lambda _: ())
    total = job.allocation.num_passes * len(seen)
    with progress_bar(console, "allocating", total, "layers") as advance:

        def scores(keys: Iterable[str]) -> Iterator[tuple[LayerSpec, Tensor]]:
            for key in keys:
                yield job.layers[key], score_of(job, key, score)
                advance(1)

        return job.allocation.budgets(seen, job.targets, scores)


def _prune_shard(
    config: PruneConfig, job: PruneJob, shard: Shard, console: Console
) -> tuple[PruneResult, ...]:
    """Rewrite this shard's files; publish if that completes them."""
    identity = repr([_identity(config, job, target) for target in job.targets]).encode()
    if not _is_done(config, job):
        _verify(job)
    with SharedStaging(config.out, shard, identity, lambda: _is_done(config, job)) as staging:
        if staging.is_published:
            return ()
        job = replace(job, budgets=_budgets(config, job, console))
        with progress_bar(console, "pruning", len(job.layers), "layers") as advance:
            for index in shard.share(len(job.checkpoint.files)):
                file = job.checkpoint.files[index]
                if not staging.is_written(file):
                    staging.record(file, write_file(job, file, staging.folder, advance).to_bytes())
        with staging.last_of(job.checkpoint.files) as records:
            if records is None:
                return ()
            return _publish_shards(config, job, staging, records, console)


def _publish_shards(
    config: PruneConfig,
    job: PruneJob,
    staging: SharedStaging,
    records: Iterable[bytes],
    console: Console,
) -> tuple[PruneResult, ...]:
    """Complete what all shards have written."""
    written = Written()
    for data in records:
        written.add(Written.from_bytes(data))
    try:
        results = _finish(config, job, staging.folder, written)
    except GradpipeError as error:
        staging.forget()
        raise GradpipeError(f"{error}: run all shards again") from error
    staging.publish()
    _say(job, written, console)
    return results


def _is_done(config: PruneConfig, job: PruneJob) -> bool:
    """True if OUT is what this very command writes; InputError if it may not be written."""
    for target in job.targets:
        try:
            found = json.loads((job.folder(config.out, target) / REPORT).read_bytes())
            same = [found[key] == value for key, value in _identity(config, job, target).items()]
        except (OSError, ValueError, KeyError, TypeError):
            same = [False]
        if not all(same):
            _check_out(config, job)
            return False
    return True


def _identity(config: PruneConfig, job: PruneJob, target: Target) -> dict[str, object]:
    """What all shards of one command agree on, as `pruning.json` has it."""
    report = _report(config, job, target, Written())
    names = ("model", "revision", "store", "command")
    return {"gradpipe": version("gradpipe"), **{name: report[name] for name in names}}


def _finish(
    config: PruneConfig, job: PruneJob, staging: Path, written: Written
) -> tuple[PruneResult, ...]:
    """Copy what is not weights, read the weights back, and write the reports."""
    results = []
    for target in job.targets:
        folder = job.folder(staging, target)
        for path in job.checkpoint.companions():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(job.checkpoint.folder / path, folder / path)
        result = PruneResult(
            folder=job.folder(config.out, target),
            label=target.label,
            requested=float(target.budget.sparsity),
            layers=tuple(_read_back(job, target, folder, written)),
        )
        write_report(folder, _report(config, job, target, written), result)
        results.append(result)
    return tuple(results)


def _read_back(
    job: PruneJob, target: Target, folder: Path, written: Written
) -> Iterator[LayerResult]:
    """Count the zeros that are really in the written file."""
    checkpoint = Checkpoint.open(str(folder))
    for key, layer in sorted(job.layers.items()):
        data = checkpoint.read_bytes(key)
        if digest(data) != written.digests[target.label][key]:
            raise GradpipeError(
                f"layer {layer.name} reads back from {folder} otherwise than it was written"
            )
        yield LayerResult(
            name=layer.name,
            requested=float(job.budget(target, key).sparsity),
            pattern=_pattern(job.budget(target, key)),
            zeros=count_zeros(as_tensor(data, checkpoint.tensors[key])),
            size=layer.num_weights,
        )


def _pattern(budget: Budget) -> str | None:
    return None if budget.pattern is None else str(budget.pattern)


def _report(
    config: PruneConfig, job: PruneJob, target: Target, written: Written
) -> dict[str, object]:
    """What was done, for `pruning.json`: the same whether or not other targets ran beside it."""
    leave_out = {"model", "store", "out", "sparsities", "patterns", "overwrite", "device", "shard"}
    pattern = _pattern(target.budget)
    goal = {"pattern": pattern} if pattern else {"sparsity": target.sparsity}
    options = changed_options(config, leave_out) | goal
    if config.score is None:
        options["method"] = config.method
    score = job.procedure.score
    return {
        "model": job.checkpoint.label,
        "revision": job.checkpoint.revision,
        "store": job.store.digest,
        "method": config.method if config.score is None else config.score,
        "score": None if score is None else score.expression.text,
        "update": config.update,
        "curvature": config.curvature,
        "allocation": config.allocation,
        "statistics": list(config.statistics),
        "alpha": config.alpha,
        "grad_norm": config.grad_norm,
        "group": config.group or METHODS[config.method].group,
        "pattern": pattern or "unstructured",
        "mismatched_layers": sorted(written.mismatched),
        "unseen_layers": sorted(job.layers[key].name for key in job.unseen),
        "notes": [*_missed(job, target), *sorted(written.notes)],
        "command": recorded_command("prune", (job.checkpoint.label, "STORE", "OUT"), options),
    }
