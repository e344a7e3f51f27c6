"""Stage two: sparsify a checkpoint at any number of sparsities from a gradient store.

The model is never built: safetensors files stream through, one weight at a time, and everything
that is not pruned is copied byte for byte. All targets share one load and one score.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from torch import Tensor

from gradpipe.errors import GradpipeError
from gradpipe.pipeline.places import REPORT, check_out
from gradpipe.pipeline.progress import QUIET, progress_bar
from gradpipe.pipeline.prune.config import PruneConfig
from gradpipe.pipeline.prune.files import Written, score_of, write_file
from gradpipe.pipeline.prune.layers import select_layers
from gradpipe.pipeline.prune.outcome import finish, identity, missed_target
from gradpipe.pipeline.prune.plan import Layers, PruneJob
from gradpipe.pipeline.prune.staging import SharedStaging, Staging
from gradpipe.pipeline.reports.results import PruneResult
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.device import resolve_device
from gradpipe.stages.prune.allocation import Budgets, own_target
from gradpipe.store.reader import GradientStore
from gradpipe.store.schema import LayerSpec
from gradpipe.store.shard import Shard


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
        results = finish(config, job, staging.folder, written)
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
    missed = (note for target in job.targets for note in missed_target(job, target))
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
    shared = repr([identity(config, job, target) for target in job.targets]).encode()
    if not _is_done(config, job):
        _verify(job)
    with SharedStaging(config.out, shard, shared, lambda: _is_done(config, job)) as staging:
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
        results = finish(config, job, staging.folder, written)
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
            same = [found[key] == value for key, value in identity(config, job, target).items()]
        except (OSError, ValueError, KeyError, TypeError):
            same = [False]
        if not all(same):
            _check_out(config, job)
            return False
    return True
