"""How far a worker has come, safe on disk, so that the same command goes on from there.

The schedules are saved in two ways. One that is cumulative gives out the sums of all layers over
more and more samples: now and then they are written as a snapshot, which replaces the one before.
The other gives out one block after the other, whole: each is written, into the store itself if
this worker is alone, and committed.

Alone, a worker also finishes the store; as one of several shards it leaves raw sums to be merged.
Ranks do together what one worker does alone: sums are added before they are encoded. Blocks are
saved as a lone worker saves them, so that any number of ranks goes on; snapshots are each rank's,
of its own samples, as shards have them.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gradpipe.errors import Interrupted, StoreError
from gradpipe.pipeline.collect.reduce import added
from gradpipe.pipeline.ranks import Ranks
from gradpipe.stages.collect.schedule import Part, Schedule
from gradpipe.stages.collect.sums import LayerAccumulator
from gradpipe.store.folder import LOCK_NAME, Calibration
from gradpipe.store.lock import locked
from gradpipe.store.objects import CommitRecord
from gradpipe.store.schema import StoreSpec
from gradpipe.store.shard import Shard
from gradpipe.store.snapshots import Snapshots
from gradpipe.store.writer import StoreWriter

SCRATCH = "scratch"  # the folder beside the snapshots that `streamed` keeps activations in
_SNAPSHOT_SHARE = 0.04  # of the time, at most, goes into snapshots
_FIRST_SNAPSHOT = 60.0  # seconds: before that, starting over costs less


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A worker's part of a collection that has begun, and where it is kept."""

    store: Path
    spec: StoreSpec
    calibration: Calibration
    shard: Shard
    ranks: Ranks

    @property
    def share(self) -> Shard:
        """The part of the samples that is this worker's."""
        return share_of(self.shard, self.ranks)

    @property
    def samples(self) -> range:
        """Ids of the samples that are this worker's."""
        return self.share.part_of(self.spec.samples.num_samples)

    @property
    def is_alone(self) -> bool:
        """True if the sums of this worker, and of the ranks beside it, are the store's."""
        return self.shard.count == 1

    @property
    def blocks(self) -> Snapshots:
        """Whole blocks that the worker has saved, with all ranks'."""
        return Snapshots(self.store, self.shard)

    @property
    def snapshots(self) -> Snapshots:
        """Sums over its own samples that the worker has saved."""
        return Snapshots(self.store, self.share)

    @property
    def scratch(self) -> Path:
        """The folder in the store for this worker's activations."""
        folder = self.blocks.folder / SCRATCH
        return folder if self.ranks.count == 1 else folder / self.share.name


def share_of(shard: Shard, ranks: Ranks) -> Shard:
    """The part of the samples that is one process's: its rank's, or its shard's."""
    return shard if ranks.count == 1 else Shard(ranks.index, ranks.count)


def parts_in(snapshots: Snapshots) -> dict[str, Part]:
    """Parts that are saved, by their snapshots' names, in order."""
    found = {name: Part.parse(name) for name in snapshots.names()}
    return {name: part for name, part in found.items() if part is not None}


class BySamples:
    """Saves the sums of all layers, over more and more samples."""

    def __init__(
        self,
        place: Place,
        schedule: Schedule,
        checkpoint_every: int | None,
        stop_requested: Callable[[], bool],
    ) -> None:
        """`checkpoint_every` is in samples; None: as often as costs little."""
        self._place = place
        self._sums = schedule.restorable
        self._timer = _SnapshotTimer(every=checkpoint_every)
        self._stop_requested = stop_requested

    def restore(self) -> frozenset[Part]:
        """Fill the schedule's sums from the newest sound snapshot; all else is deleted."""
        snapshots = self._place.snapshots
        for name, part in reversed(parts_in(snapshots).items()):
            if part.is_cumulative and self._read(name):
                snapshots.keep_only(name)
                self._timer.done = part.index
                return frozenset({part})
        snapshots.keep_only()
        return frozenset()

    def _read(self, name: str) -> bool:
        """Whether a snapshot is sound; if it isn't, an older one, or none, does as well."""
        statistics = self._place.spec.statistics
        try:
            snapshot = self._place.snapshots.read(name)
            for accumulator in self._sums:
                accumulator.restore(snapshot.layer(accumulator.spec, statistics))
        except StoreError:
            for accumulator in self._sums:
                accumulator.clear()
            return False
        return True

    def save(self, part: Part, sums: Sequence[LayerAccumulator]) -> None:
        """Write a snapshot if it is time, if this is to stop, or if a shard is finished."""
        total = len(self._place.samples)
        is_last = part.index == total
        if is_last and self._place.is_alone:
            return  # it is written into the store next
        if is_last or self._stop_requested() or self._timer.is_due(part.index):
            with self._timer.measured(part.index):
                self._write(part, sums)
        if self._stop_requested() and not is_last:
            raise Interrupted(f"stopped after {part.index} of {total} samples")

    def _write(self, part: Part, sums: Sequence[LayerAccumulator]) -> None:
        snapshots, samples = self._place.snapshots, self._place.samples[: part.index]
        snapshots.write(part.name, samples, ((x.spec, x.result()) for x in sums))
        snapshots.keep_only(part.name)

    def finish(self) -> None:
        """Write the whole store from sums in memory; asked to stop, save those instead."""
        place = self._place
        if not place.is_alone:
            return
        try:
            records = place.ranks.gathered(self._write_layers())
        except Interrupted:
            self._write(Part.of_samples(len(place.samples)), self._sums)
            raise
        place.ranks.first(lambda: _finish(place, records))

    def _write_layers(self) -> CommitRecord:
        """Write the layers that are this worker's; returns what was written."""
        place = self._place
        writer = StoreWriter(place.store, place.spec)
        record = CommitRecord()
        for spec, stats in added(place.ranks, self._sums, place.spec.statistics, frees=False):
            if self._stop_requested():
                raise Interrupted("stopped while the store was written; all samples are saved")
            record.add(writer.write_layer(spec, stats))
        return record


class ByBlocks:
    """Saves one block's sums after the other's, each once."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._writer = StoreWriter(place.store, place.spec)

    def restore(self) -> frozenset[Part]:
        """Which parts are committed and sound; found once for all ranks."""
        return self._place.ranks.first(self._restore)

    def _restore(self) -> frozenset[Part]:
        blocks = self._place.blocks
        begun = {name: x for name, x in parts_in(blocks).items() if not x.is_cumulative}
        done = {name: part for name, part in begun.items() if blocks.is_sound(name)}
        blocks.keep_only(*done, SCRATCH)
        return frozenset(done.values())

    def save(self, part: Part, sums: Sequence[LayerAccumulator]) -> None:
        """Alone, write the block's statistics; else its sums, to be merged."""
        place = self._place
        if not place.is_alone:
            layers = ((x.spec, x.result()) for x in sums)
            place.blocks.write(part.name, place.samples, layers)
            return
        written, *others = place.ranks.gathered(self._write(sums))
        if place.ranks.is_first:
            for more in others:
                written.add(more)
            place.blocks.commit(part.name, written)

    def _write(self, sums: Sequence[LayerAccumulator]) -> CommitRecord:
        """Write the statistics of the layers that are this worker's; returns what was written."""
        place, record = self._place, CommitRecord()
        for spec, stats in added(place.ranks, sums, place.spec.statistics, frees=True):
            record.add(self._writer.write_layer(spec, stats))
        return record

    def finish(self) -> None:
        """Alone, make a store of the statistics that are written."""
        place = self._place
        if place.is_alone:
            place.ranks.first(
                lambda: _finish(place, map(place.blocks.record, place.blocks.names()))
            )


def _finish(place: Place, records: Iterable[CommitRecord]) -> None:
    """Make a store of what these records name, and declare it complete."""
    with locked(place.store / LOCK_NAME, of=place.store, wait=True):
        writer = StoreWriter(place.store, place.spec)
        writer.begin(place.calibration)
        for record in records:
            writer.adopt(record)
        writer.commit()


@dataclass(slots=True)
class _SnapshotTimer:
    """Decides when a snapshot is worth its time."""

    every: int | None  # samples; None: so that snapshots take under `_SNAPSHOT_SHARE`
    pause: float = _FIRST_SNAPSHOT  # seconds
    done: int = 0  # samples in the last snapshot
    last: float = field(default_factory=time.monotonic)

    def is_due(self, done: int) -> bool:
        if self.every is not None:
            return done - self.done >= self.every
        return time.monotonic() - self.last >= self.pause

    @contextmanager
    def measured(self, done: int) -> Iterator[None]:
        """Time a snapshot, and space the next one by what it took."""
        start = time.monotonic()
        yield
        self.last = time.monotonic()
        self.done = done
        self.pause = max(_FIRST_SNAPSHOT, (self.last - start) / _SNAPSHOT_SHARE)
