"""How far a worker has come, safe on disk, so that the same command goes on from there.

The schedules are saved in two ways. One that is cumulative gives out the sums of all layers over
more and more samples: now and then they are written as a snapshot, which replaces the one before.
The other gives out one block after the other, whole: each is written, into the store itself if
this worker is alone, and committed.

Alone, a worker also finishes the store; as one of several shards it leaves raw sums to be merged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from gradpipe.errors import Interrupted, StoreError
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

    @property
    def samples(self) -> range:
        """Ids of the samples that are this worker's."""
        return self.shard.part_of(self.spec.samples.num_samples)

    @property
    def is_alone(self) -> bool:
        """True if this worker's sums are the store's."""
        return self.shard.count == 1

    @property
    def snapshots(self) -> Snapshots:
        """What the worker has saved."""
        return Snapshots(self.store, self.shard)

    def begun_parts(self) -> dict[str, Part]:
        """Parts that are saved, by their snapshots' names, in order."""
        found = {name: Part.parse(name) for name in self.snapshots.names()}
        return {name: part for name, part in found.items() if part is not None}

    @contextmanager
    def finished_store(self) -> Iterator[StoreWriter]:
        """Write what is left of the store, then declare it complete."""
        with locked(self.store / LOCK_NAME, of=self.store, wait=True):
            writer = StoreWriter(self.store, self.spec)
            writer.begin(self.calibration)
            yield writer
            writer.commit()


class Progress(Protocol):
    """One way of saving."""

    def restore(self) -> frozenset[Part]:
        """What is saved and sound; all else is deleted."""

    def save(self, part: Part, sums: Sequence[LayerAccumulator]) -> None:
        """Save a part that a schedule gives out; Interrupted if it is to stop there."""

    def finish(self) -> None:
        """Alone, finish the store from all parts."""


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
        """Fill the schedule's sums from the newest sound snapshot."""
        snapshots = self._place.snapshots
        for name, part in reversed(self._place.begun_parts().items()):
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
        """Write a snapshot, then delete the one before."""
        snapshots, samples = self._place.snapshots, self._place.samples[: part.index]
        snapshots.write(part.name, samples, ((x.spec, x.result()) for x in sums))
        snapshots.keep_only(part.name)

    def finish(self) -> None:
        """Write the whole store from sums in memory; asked to stop, save those instead."""
        if not self._place.is_alone:
            return
        with self._place.finished_store() as writer:
            for accumulator in self._sums:
                if self._stop_requested():
                    self._write(Part.of_samples(len(self._place.samples)), self._sums)
                    raise Interrupted("stopped while the store was written; all samples are saved")
                writer.write_layer(accumulator.spec, accumulator.result())


class ByBlocks:
    """Saves one block's sums after the other's, each once."""

    def __init__(self, place: Place) -> None:
        """Nothing is read or written yet."""
        self._place = place
        self._writer = StoreWriter(place.store, place.spec)

    def restore(self) -> frozenset[Part]:
        """Which parts are committed and sound."""
        snapshots = self._place.snapshots
        begun = {n: part for n, part in self._place.begun_parts().items() if not part.is_cumulative}
        done = {name: part for name, part in begun.items() if snapshots.is_sound(name)}
        snapshots.keep_only(*done, SCRATCH)
        return frozenset(done.values())

    def save(self, part: Part, sums: Sequence[LayerAccumulator]) -> None:
        """Alone, write the block's statistics; else its sums, to be merged."""
        if self._place.is_alone:
            self._place.snapshots.commit(part.name, self._write(sums))
        else:
            layers = ((x.spec, x.result()) for x in sums)
            self._place.snapshots.write(part.name, self._place.samples, layers)

    def _write(self, sums: Sequence[LayerAccumulator]) -> CommitRecord:
        """Write a block's statistics, freeing its sums; returns what was written."""
        record = CommitRecord()
        for x in sorted(sums, key=lambda x: x.spec.num_weights):  # the largest needs most room
            record.objects.update(self._writer.write_layer(x.spec, x.result()).objects)
            x.free()
        return record

    def finish(self) -> None:
        """Alone, make a store of the statistics that are written."""
        if self._place.is_alone:
            with self._place.finished_store() as writer:
                for name in self._place.snapshots.names():
                    writer.adopt(self._place.snapshots.record(name))


@dataclass(slots=True)
class _SnapshotTimer:
    """Decides when a snapshot is worth its time."""

    every: int | None  # samples; None: so that snapshots take under `_SNAPSHOT_SHARE`
    pause: float = _FIRST_SNAPSHOT  # seconds
    done: int = 0  # samples in the last snapshot
    last: float = field(default_factory=time.monotonic)

    def is_due(self, done: int) -> bool:
        """True if it is time, now that so many samples are done."""
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
