"""Stage two: sparsify a checkpoint at any number of sparsities from a gradient store.

The model is never built: safetensors files stream through, one weight at a time, and everything
that is not pruned is copied byte for byte. All targets share one load and one score.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from gradpipe.errors import ODD_DOCUMENT, GradpipeError, InputError, Interrupted
from gradpipe.options import refuse_given
from gradpipe.pipeline.launch import Launch
from gradpipe.pipeline.places import REPORT, check_out, check_scratch
from gradpipe.pipeline.progress import QUIET, counted, progress_bar, tell
from gradpipe.pipeline.prune.allocate import allocate
from gradpipe.pipeline.prune.config import PruneConfig
from gradpipe.pipeline.prune.duty import Duty
from gradpipe.pipeline.prune.files import Written, write_file
from gradpipe.pipeline.prune.outcome import finish, order_of
from gradpipe.pipeline.prune.plan import AllocatedPlan, PrunePlan
from gradpipe.pipeline.prune.staging import SharedStaging, Staging
from gradpipe.pipeline.prune.workers import side_by_side
from gradpipe.pipeline.ranks import Ranks, common_facts, joined
from gradpipe.pipeline.reports.results import PruneResult
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.device import own_torch
from gradpipe.store.reader import GradientStore
from gradpipe.store.shard import Shard


@own_torch()
def prune(config: PruneConfig, console: Console = QUIET) -> tuple[PruneResult, ...]:
    """Run stage two: sparsify a checkpoint from a store, at each sparsity and pattern asked for.

    As one of several shards, rewrite a share of the checkpoint's files; the one that completes
    them publishes the output.

    Args:
        config: The checkpoint, the store, the targets and how to reach them.
        console: Where progress and warnings are shown; nowhere by default.

    Returns:
        One result for each target, in the order asked for; none where another shard publishes.

    Raises:
        InputError: If model, store and options do not fit together.
        StoreError: If the store is incomplete or damaged.
        GradpipeError: If the disk fails. On any error nothing is left behind, but for what other
            shards need.

    Example:
        >>> from pathlib import Path
        >>> from gradpipe import PruneConfig, prune
        >>> (half,) = prune(
        ...     PruneConfig(model="embedded", store="store", out=Path("out"), sparsities=(0.5,))
        ... )
        >>> half.achieved
        0.5

    """
    with joined(config.rank_timeout) as ranks:
        try:
            return _prune(config, ranks, console if ranks.is_first else QUIET)
        except Interrupted as error:
            raise Interrupted(f"{error}: run the same command again") from error


def _prune(config: PruneConfig, ranks: Ranks, console: Console) -> tuple[PruneResult, ...]:
    """What each rank does, in step with the others."""
    plan = ranks.together(lambda: _planned(config))
    if plan.warning is not None:
        tell(console, plan.warning)
    if ranks.count > 1:
        own = {"the store's digest": plan.store.digest, "--allocation": plan.allocation.name}
        ranks.agree(common_facts(config, plan.checkpoint) | own)
    elif config.shard is not None:
        return _prune_shard(config, plan, config.shard, console)
    staging = Staging(config.out, lambda: _check_out(config, plan))
    ranks.first(staging.check)
    ranks.together(lambda: verify(plan, ranks, console))
    with ExitStack() as held:
        ranks.first(lambda: held.enter_context(staging.begun()))
        if not ranks.is_first:
            held.enter_context(staging.joined())
        allocated = _allocated(plan, ranks, console)
        duty = Duty.of(plan, ranks)
        written = ranks.together(lambda: _write(allocated, duty, staging.folder, console))
        written = Written.sum(ranks.gathered(written))
        results = finish(config, allocated, staging.folder, duty, written)
        ranks.first(staging.publish)
    _say(allocated, results, console)
    return results


def open_store(config: PruneConfig) -> GradientStore:
    """The store; InputError if a cache is given that would be of no use."""
    if config.cache is not None:
        check_scratch(config.cache, "--cache")
    store = GradientStore.open(config.store, cache=config.cache)
    if store.local_folder is not None:
        refuse_given(config, ("cache",), f"store {store.url} is read from this machine's disk")
    return store


def _planned(config: PruneConfig) -> PrunePlan:
    """The plan, computed where a rank should."""
    launch = Launch.of(os.environ)
    if launch.count > 1 and (config.shard or Shard(0, 1)).count > 1:
        raise InputError(
            f"the {launch.count} ranks share the layers out: leave out --shard; in a Slurm array "
            "that is about something else, give --shard 0/1"
        )
    device = launch.device(config.device, torch.cuda.device_count())
    checkpoint = Checkpoint.open(config.model)
    return PrunePlan.of(replace(config, device=device), checkpoint, open_store(config))


def _allocated(plan: PrunePlan, ranks: Ranks, console: Console) -> AllocatedPlan:
    """Budgets: what is found by looking at scores is found once, for all ranks."""
    with plan.reading_ahead(plan.layers):
        budgets = ranks.first(lambda: allocate(plan, console).budgets)
    return AllocatedPlan(plan=plan, budgets=budgets)


def _write(allocated: AllocatedPlan, duty: Duty, folder: Path, console: Console) -> Written:
    """Write this rank's layers of every file; the bar is the first rank's."""
    plan = allocated.plan
    own = duty.layers(plan.layers)
    with (
        plan.reading_ahead(own),
        progress_bar(console, "pruning", len(own), "layers") as advance,
    ):
        files = plan.checkpoint.files
        return Written.sum(write_file(allocated, x, folder, duty, advance) for x in files)


def _check_out(config: PruneConfig, plan: PrunePlan) -> None:
    read = (plan.checkpoint.folder, plan.store.local_folder, config.cache)
    sources = tuple(folder for folder in read if folder is not None)
    check_out(config.out, overwrite=config.overwrite, sources=sources)


def verify(plan: PrunePlan, ranks: Ranks, console: Console) -> None:
    """Verify a local store before a weight is written; a remote one is verified as it is read."""
    if plan.store.local_folder is not None:
        with side_by_side(plan.workers) as pool:

            def each(check: Callable[[str], None], keys: list[str]) -> Iterator[None]:
                own = keys[ranks.index :: ranks.count]
                done = pool.map(check, own)
                return counted(done, console, "verifying the store", len(own), "objects")

            plan.store.verify(each)


def _say(allocated: AllocatedPlan, results: Sequence[PruneResult], console: Console) -> None:
    """What the user should know of a run that went well."""
    plan = allocated.plan
    for note in dict.fromkeys(note for result in results for note in result.report.notes):
        tell(console, note)
    if plan.unseen:
        tell(
            console,
            f"{len(plan.unseen)} layers that no calibration token reached are pruned by magnitude; "
            "pruning.json lists them: collect with more samples to score them",
        )
    for target in plan.targets:
        if plan.allocation.keeps_pattern(target) and plan.allocation.rule.wish is not None:
            tell(
                console,
                f"{target.pattern} in every block, whatever the allocation: --mixed-patterns "
                "lets it choose",
            )


def _prune_shard(
    config: PruneConfig, plan: PrunePlan, shard: Shard, console: Console
) -> tuple[PruneResult, ...]:
    """Rewrite this shard's files; publish if that completes them."""
    orders = [order_of(config, plan, target) for target in plan.targets]
    shared = repr([order.identity for order in orders]).encode()
    if not _is_done(config, plan):
        verify(plan, Ranks(), console)
    staging = SharedStaging(config.out, shard, shared, lambda: _is_done(config, plan))
    with staging.begun():
        if staging.is_published:
            return ()
        files, duty = plan.checkpoint.files, Duty.of(plan, Ranks())
        with (
            plan.reading_ahead(plan.layers),
            progress_bar(console, "pruning", len(plan.layers), "layers") as advance,
        ):
            allocated = allocate(plan, console)
            for file in (files[index] for index in shard.part_of(len(files))):
                if not staging.is_written(file):
                    written = write_file(allocated, file, staging.folder, duty, advance)
                    staging.record(file, written.to_bytes())
        with staging.last_of(files) as records:
            if records is None:
                return ()
            return _publish_shards(config, allocated, staging, records, console)


def _publish_shards(
    config: PruneConfig,
    allocated: AllocatedPlan,
    staging: SharedStaging,
    records: Iterable[bytes],
    console: Console,
) -> tuple[PruneResult, ...]:
    """Complete what all shards have written."""
    written = Written.sum(map(Written.from_bytes, records))
    duty = Duty.of(allocated.plan, Ranks())
    try:
        results = finish(config, allocated, staging.folder, duty, written)
    except GradpipeError as error:
        staging.forget()
        raise GradpipeError(f"{error}: run all shards again") from error
    staging.publish()
    _say(allocated, results, console)
    return results


def _is_done(config: PruneConfig, plan: PrunePlan) -> bool:
    """True if OUT is what this very command writes; InputError if it may not be written."""
    if _is_published(config, plan):
        return True
    try:
        _check_out(config, plan)
    except InputError:
        if _is_published(config, plan):  # by another shard, since it was looked for
            return True
        raise
    return False


def _is_published(config: PruneConfig, plan: PrunePlan) -> bool:
    """True if OUT is what this very command writes."""
    for target in plan.targets:
        identity = order_of(config, plan, target).identity
        try:
            found = json.loads((plan.folder(config.out, target) / REPORT).read_bytes())
            if any(found[key] != value for key, value in identity.items()):
                return False
        except (OSError, *ODD_DOCUMENT):
            return False
    return True
