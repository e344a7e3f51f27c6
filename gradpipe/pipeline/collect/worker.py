"""One worker's part of stage one: its samples through a schedule, its progress safe on disk."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from gradpipe.errors import Interrupted
from gradpipe.pipeline.collect.config import CollectConfig
from gradpipe.pipeline.collect.resume import SCRATCH, ByBlocks, BySamples, Place, parts_in, share_of
from gradpipe.pipeline.interrupt import stop_requests
from gradpipe.pipeline.progress import progress_bar, tell
from gradpipe.pipeline.ranks import Ranks
from gradpipe.stages.collect.estimate import Estimate
from gradpipe.stages.collect.placement import Placement
from gradpipe.stages.collect.resident import Resident
from gradpipe.stages.collect.schedule import Schedule
from gradpipe.stages.collect.streamed import Streamed
from gradpipe.stages.device import memory_errors
from gradpipe.stages.model.batch import calibration_batch
from gradpipe.stages.model.skeleton import Skeleton
from gradpipe.store.folder import BEGUN_KEY
from gradpipe.store.objects import digest
from gradpipe.store.shard import Shard
from gradpipe.store.snapshots import Snapshots


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A worker's part of a collection that has begun, and how it is to be run."""

    place: Place
    skeleton: Skeleton
    plan: Estimate
    device: torch.device
    placement: Placement | None  # of a resident model that is not whole on the device
    config: CollectConfig

    @property
    def scratch_folder(self) -> Path:
        """A folder that belongs to this collection and shard alone, and to none begun before it."""
        place = self.place
        if self.config.scratch is None:
            return place.scratch
        begun = (place.store / BEGUN_KEY).stat().st_mtime_ns
        mine = (place.store.resolve(), place.spec, place.share, self.config.batch_size, begun)
        return self.config.scratch / f"gradpipe-{digest(repr(mine).encode())}"


def run_part(job: Job, console: Console) -> None:
    """Collect the part, whose lock the caller holds; alone, finish the store.

    Raises Interrupted on a signal, all saved; GradpipeError if memory runs out.
    """
    tell(console, f"schedule {job.plan.schedule}: {job.plan.reason}")
    with stop_requests() as stop_requested, memory_errors(f"run again {_smaller(job)}"):
        schedule = _schedule(job)
        progress: ByBlocks | BySamples = ByBlocks(job.place)
        if schedule.is_cumulative:
            progress = BySamples(job.place, schedule, job.config.checkpoint_every, stop_requested)
        moves = _run(job, schedule, progress, console, stop_requested)
        shutil.rmtree(job.scratch_folder, ignore_errors=True)
        progress.finish()  # first: it saves what this rank has if another is lost meanwhile
        _tell_zeros(job.place.ranks.gathered(moves), console)


def _run(
    job: Job,
    schedule: Schedule,
    progress: ByBlocks | BySamples,
    console: Console,
    stop_requested: Callable[[], bool],
) -> dict[str, bool]:
    """Have the schedule do what is not done yet, and save each part that it gives out.

    Returns of each layer that tokens reached whether a gradient is not zero.
    """
    tokens = job.place.spec.samples.seq_len if schedule.is_cumulative else 0
    moves = dict[str, bool]()
    bar = progress_bar(console, "collecting", schedule.num_steps, schedule.unit, tokens)
    with bar as advance:

        def step(count: int) -> None:
            advance(count)
            if stop_requested() and not schedule.is_cumulative:  # one that is stops when it saves
                raise Interrupted("stopped; every finished block is saved")

        for part, sums in schedule.run(progress.restore(), step):
            if not part.is_cumulative or part.index == len(job.place.samples):
                moves |= {x.spec.name: not x.has_zero_gradients for x in sums if x.num_tokens}
            progress.save(part, sums)
    return moves


def _tell_zeros(of_ranks: Sequence[dict[str, bool]], console: Console) -> None:
    """Name a layer on whose weights no rank's loss depends, though tokens reached it."""
    names = dict.fromkeys(name for moves in of_ranks for name in moves)
    if zeros := [x for x in names if not any(moves.get(x, False) for moves in of_ranks)]:
        tell(
            console,
            f"gradients of {len(zeros)} layers are all zero, as {zeros[0]}'s are: on these samples "
            "the loss does not depend on their weights",
        )


def _schedule(job: Job) -> Schedule:
    place = job.place
    samples = calibration_batch(place.calibration, place.spec.samples, place.samples)
    how = (job.skeleton, place.spec.statistics, samples, job.config.batch_size)
    if job.plan.schedule == "resident":
        return Resident(*how, job.placement or Placement({"": job.device}))
    return Streamed(*how, job.device, job.scratch_folder)


def _smaller(job: Job) -> str:
    """What to give where memory runs out."""
    options = "with --overwrite a smaller --batch-size or --seq-len"
    is_resident = job.plan.schedule == "resident"
    return f"--schedule streamed, or {options}" if is_resident else options


def begun_schedule(store: Path, shard: Shard, ranks: Ranks) -> str | None:
    """The schedule under which a collection was begun, None if there is nothing of it.

    Of a rank: of its own samples or, together with others, of the whole.
    """
    own, whole = Snapshots(store, share_of(shard, ranks)), Snapshots(store, shard)
    parts = [*parts_in(own).values(), *parts_in(whole).values()]
    if any(part.is_cumulative for part in parts):
        return "resident"
    return "streamed" if parts or (whole.folder / SCRATCH).exists() else None
