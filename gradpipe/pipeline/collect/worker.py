"""One worker's share of stage one: its samples through a schedule, its progress safe on disk.

Alone, a worker writes the store itself; as one of several shards it leaves raw sums to be merged.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from gradpipe.errors import Interrupted, StoreError
from gradpipe.pipeline.interrupt import stop_requests
from gradpipe.pipeline.progress import progress_bar
from gradpipe.stages.collect.estimate import Plan
from gradpipe.stages.collect.resident import resident_batch
from gradpipe.stages.collect.streamed import Streamed
from gradpipe.stages.collect.sums import LayerAccumulator
from gradpipe.stages.device import memory_errors
from gradpipe.stages.model.batch import Batch, calibration_batch
from gradpipe.stages.model.experts import split_experts
from gradpipe.stages.model.layers import Skeleton
from gradpipe.stages.model.load import load_model
from gradpipe.store.folder import LOCK_NAME, Calibration
from gradpipe.store.lock import locked
from gradpipe.store.objects import CommitRecord, digest
from gradpipe.store.schema import StoreSpec
from gradpipe.store.shard import Shard
from gradpipe.store.snapshots import Snapshots
from gradpipe.store.writer import StoreWriter

_SNAPSHOT_SHARE = 0.04  # of the time, at most, goes into snapshots

_SCRATCH = "scratch"

_SAMPLES = "samples-"  # and how many, in the name of a resident snapshot

_FIRST_SNAPSHOT = 60.0  # seconds: before that, starting over costs less


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A worker's part of a collection that has begun."""

    skeleton: Skeleton
    spec: StoreSpec
    calibration: Calibration
    plan: Plan
    device: torch.device
    store: Path
    shard: Shard
    batch_size: int
    scratch: Path | None
    checkpoint_every: int | None

    @property
    def share(self) -> range:
        """Ids of the samples that are this worker's."""
        return self.shard.part_of(self.spec.samples.num_samples)

    @property
    def is_alone(self) -> bool:
        """True if this worker's sums are the store's."""
        return self.shard.count == 1

    def samples(self) -> Batch:
        """All samples of the share."""
        return calibration_batch(self.calibration, self.spec.samples, self.share)


def run_share(job: Job, console: Console) -> None:
    """Collect the share, whose lock the caller holds; alone, finish the store.

    Raises Interrupted on a signal, all saved; GradpipeError if memory runs out.
    """
    partial = Snapshots(job.store, job.shard)
    console.print(f"schedule {job.plan.schedule}: {job.plan.reason}", highlight=False)
    smaller = "with --overwrite a smaller --batch-size or --seq-len"
    if job.plan.schedule == "resident":
        smaller = f"--schedule streamed, or {smaller}"
    with stop_requests() as stop_requested, memory_errors(f"run again {smaller}"):
        run = _run_resident if job.plan.schedule == "resident" else _run_streamed
        run(job, partial, console, stop_requested)


def _run_resident(
    job: Job, partial: Snapshots, console: Console, stop_requested: Callable[[], bool]
) -> None:
    sums = {
        x.path: LayerAccumulator(x.spec, job.spec.statistics, job.device)
        for x in job.skeleton.layers
    }
    every = list(sums.values())
    done = _restore(job, partial, every)
    if done < len(job.share):
        _accumulate(job, partial, sums, done, console, stop_requested)
    if job.is_alone:
        _finish(job, partial, every, stop_requested)


def _accumulate(
    job: Job,
    partial: Snapshots,
    sums: dict[str, LayerAccumulator],
    done: int,
    console: Console,
    stop_requested: Callable[[], bool],
) -> None:
    """Run the model over what is left of the share; a shard's sums are saved at the end."""
    checkpoint, blocks = job.skeleton.checkpoint, job.skeleton.blocks
    model = load_model(checkpoint, job.skeleton.model.dtype, job.device)
    split_experts(model, checkpoint)
    timer = _SnapshotTimer(every=job.checkpoint_every)
    with _bar(job, console, len(job.share)) as advance:
        advance(done)
        for batch in job.samples()[done:].split(job.batch_size):
            resident_batch(model, blocks, sums, batch.to(job.device))
            done += len(batch)
            advance(len(batch))
            finished = done == len(job.share)
            if finished and job.is_alone:
                break
            if finished or stop_requested() or timer.is_due(len(batch)):
                with timer.measured():
                    _save(job, partial, list(sums.values()), done)
            if stop_requested() and not finished:
                raise Interrupted(f"stopped after {done} of {len(job.share)} samples")


def _restore(job: Job, partial: Snapshots, sums: list[LayerAccumulator]) -> int:
    """Load the newest sound snapshot; returns how many of the share's samples it covers."""
    for name in reversed(partial.names()):
        try:
            snapshot = partial.read(name)
            for accumulator in sums:
                accumulator.restore(snapshot.layer(accumulator.spec, job.spec.statistics))
        except StoreError:
            for accumulator in sums:
                accumulator.clear()
            continue  # damaged: an older one, or none, does as well
        partial.keep_only(name)
        return len(snapshot.spec.samples)
    partial.keep_only()
    return 0


def _save(job: Job, partial: Snapshots, sums: list[LayerAccumulator], done: int) -> None:
    """Write a snapshot, then delete the one before."""
    name = f"{_SAMPLES}{done:08d}"
    partial.write(name, job.share[:done], ((x.spec, x.result()) for x in sums))
    partial.keep_only(name)


def _finish(
    job: Job,
    partial: Snapshots,
    sums: list[LayerAccumulator],
    stop_requested: Callable[[], bool],
) -> None:
    """Write the whole store from sums in memory; asked to stop, save those instead."""
    with locked(job.store / LOCK_NAME, of=job.store, wait=True):
        writer = StoreWriter(job.store, job.spec)
        writer.begin(job.calibration)
        for accumulator in sums:
            if stop_requested():
                _save(job, partial, sums, len(job.share))
                raise Interrupted("stopped while the store was written; all samples are saved")
            writer.write_layer(accumulator.spec, accumulator.result())
        writer.commit()


def begun_schedule(store: Path, shard: Shard) -> str | None:
    """The schedule under which a worker has begun this shard, None if there is nothing of it."""
    partial = Snapshots(store, shard)
    if any(name.startswith(_SAMPLES) for name in partial.names()):
        return "resident"
    return "streamed" if partial.names() or (partial.folder / _SCRATCH).exists() else None


def _run_streamed(
    job: Job, partial: Snapshots, console: Console, stop_requested: Callable[[], bool]
) -> None:
    scratch = _scratch_folder(job, partial)
    done = _done_blocks(job, partial)
    writer = StoreWriter(job.store, job.spec)
    if not done >= {layer.spec.block for layer in job.skeleton.layers}:
        _stream(job, partial, writer, scratch, done, console, stop_requested)
    shutil.rmtree(scratch, ignore_errors=True)
    if job.is_alone:
        with locked(job.store / LOCK_NAME, of=job.store, wait=True):
            writer.begin(job.calibration)
            for name in partial.names():
                writer.adopt(partial.record(name))
            writer.commit()


def _stream(
    job: Job,
    partial: Snapshots,
    writer: StoreWriter,
    scratch: Path,
    done: set[int | None],
    console: Console,
    stop_requested: Callable[[], bool],
) -> None:
    """Collect the blocks that are not done, and commit each of them."""
    run = Streamed(job.skeleton, job.samples(), job.batch_size, scratch, job.device)
    with _bar(job, console, 2 * len(job.share) * job.skeleton.blocks.count) as advance:

        def step(count: int) -> None:
            advance(count)
            if stop_requested():
                raise Interrupted("stopped; every finished block is saved")

        for block, sums in run.run(job.spec.statistics, frozenset(done), step):
            name = _block_name(block)
            if job.is_alone:
                partial.commit(name, _write_block(writer, sums))
            else:
                partial.write(name, job.share, ((x.spec, x.result()) for x in sums))


def _write_block(writer: StoreWriter, sums: Sequence[LayerAccumulator]) -> CommitRecord:
    """Write a block's statistics, freeing its sums; returns what was written."""
    record = CommitRecord()
    for x in sorted(sums, key=lambda x: x.spec.num_weights):  # encoding the largest needs most room
        record.objects.update(writer.write_layer(x.spec, x.result()).objects)
        x.free()
    return record


def _done_blocks(job: Job, partial: Snapshots) -> set[int | None]:
    """Blocks whose statistics are committed and sound; all else, but for scratch, is deleted."""
    names = set(partial.names())
    blocks: list[int | None] = [None, *range(job.skeleton.blocks.count)]
    begun = {block for block in blocks if _block_name(block) in names}
    done = {block for block in begun if partial.is_sound(_block_name(block))}
    partial.keep_only(*map(_block_name, done), _SCRATCH)
    return done


def _block_name(block: int | None) -> str:
    return "outside" if block is None else f"block-{block:04d}"


def _scratch_folder(job: Job, partial: Snapshots) -> Path:
    """A folder that belongs to this collection and shard alone."""
    if job.scratch is None:
        return partial.folder / _SCRATCH
    name = digest(repr((job.store.resolve(), job.spec, job.shard, job.batch_size)).encode())
    return job.scratch / f"gradpipe-{name}"


def _bar(job: Job, console: Console, total: int) -> AbstractContextManager[Callable[[int], None]]:
    tokens = job.spec.samples.seq_len if job.plan.schedule == "resident" else 0
    unit = "samples" if tokens else "block-samples"
    return progress_bar(console, "collecting", total, unit, tokens)


@dataclass(slots=True)
class _SnapshotTimer:
    """Decides when a snapshot is worth its time."""

    every: int | None  # samples; None: so that snapshots take under `_SNAPSHOT_SHARE`
    pause: float = _FIRST_SNAPSHOT  # seconds
    samples: int = 0
    last: float = field(default_factory=time.monotonic)

    def is_due(self, num_samples: int) -> bool:
        """True if it is time, now that so many more samples are done."""
        self.samples += num_samples
        if self.every is not None:
            return self.samples >= self.every
        return time.monotonic() - self.last >= self.pause

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Time a snapshot, and space the next one by what it took."""
        start = time.monotonic()
        yield
        self.last = time.monotonic()
        self.samples = 0
        self.pause = max(_FIRST_SNAPSHOT, (self.last - start) / _SNAPSHOT_SHARE)
