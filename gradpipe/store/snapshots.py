"""Unfinished work inside a store: float32 sums that a killed run goes on from, and shards add up.

    partial/<I>-of-<N>/<name>.json            the commit record of a snapshot, written last
    partial/<I>-of-<N>/<name>/zarr.json       SnapshotSpec: which samples and layers it covers
    partial/<I>-of-<N>/<name>/<layer>/<statistic>

A snapshot is written once, under a name of its own. Sums add; roots and codes do not, which is
why nothing here is encoded. State is keyed by sample, never by process or step.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gradpipe.errors import InputError, StoreError
from gradpipe.store.arrays import Nodes, write_array, write_group
from gradpipe.store.folder import PARTIAL
from gradpipe.store.objects import CommitRecord, ObjectReader, ObjectWriter
from gradpipe.store.schema import JsonSpec, LayerSpec
from gradpipe.store.shard import Shard
from gradpipe.store.statistics import LayerStats


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCounts(JsonSpec):
    """Over how much one layer's sums were taken."""

    name: str
    num_samples: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotSpec(JsonSpec):
    """What a snapshot covers."""

    samples: tuple[int, ...]  # ids of the samples whose sums it holds
    layers: tuple[LayerCounts, ...]


class Snapshots:
    """One shard's folder of snapshots."""

    def __init__(self, store: Path, shard: Shard) -> None:
        self.store = store
        self.prefix = f"{PARTIAL}/{shard.name}"
        self.folder = store / self.prefix

    def write(
        self, name: str, samples: Iterable[int], layers: Iterable[tuple[LayerSpec, LayerStats]]
    ) -> None:
        """Write a snapshot and commit it."""
        objects = ObjectWriter(self.store)
        counts = []
        for layer, stats in layers:
            for statistic, sums in stats.arrays.items():
                write_array(objects, f"{self.prefix}/{name}/{layer.name}/{statistic}", sums)
            counts.append(
                LayerCounts(
                    name=layer.name, num_samples=stats.num_samples, num_tokens=stats.num_tokens
                )
            )
        spec = SnapshotSpec(samples=tuple(samples), layers=tuple(counts))
        write_group(objects, f"{self.prefix}/{name}", spec.to_json())
        objects.commit(f"{self.prefix}/{name}.json")

    @property
    def lock(self) -> Path:
        """The lock of whoever collects this shard; it is taken under the store's own."""
        return self.folder.with_name(f"{self.folder.name}.lock")

    def commit(self, name: str, record: CommitRecord) -> None:
        """Commit objects that were written elsewhere in the store as a snapshot of this name."""
        objects = ObjectWriter(self.store)
        objects.record = record
        objects.commit(f"{self.prefix}/{name}.json")

    def record(self, name: str) -> CommitRecord:
        """The objects of a committed snapshot; StoreError if the record is damaged."""
        key = f"{self.prefix}/{name}.json"
        return CommitRecord.from_bytes((self.store / key).read_bytes(), key)

    def names(self) -> list[str]:
        """Names of the committed snapshots, in order."""
        return sorted(path.stem for path in self.folder.glob("*.json"))

    def is_sound(self, name: str) -> bool:
        """True if every object that a commit record of this folder names is as it was written."""
        try:
            objects = ObjectReader(str(self.store), record_key=f"{self.prefix}/{name}.json")
            for key in objects.record.objects:
                objects.verify(key)
        except StoreError:
            return False
        return True

    def keep_only(self, *names: str) -> None:
        """Delete every other snapshot, and what a killed run left of one."""
        kept = {*names, *(f"{name}.json" for name in names)}
        for path in self.folder.iterdir() if self.folder.exists() else ():
            if path.name in kept:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def read(self, name: str) -> Snapshot:
        """A committed snapshot; StoreError if it is damaged."""
        return Snapshot(self.store, f"{self.prefix}/{name}")


class Snapshot:
    """A committed snapshot; each layer's sums are read, and verified, when they are asked for."""

    def __init__(self, store: Path, prefix: str) -> None:
        self._nodes = Nodes(ObjectReader(str(store), record_key=f"{prefix}.json"))
        self._prefix = prefix
        self.spec = SnapshotSpec.from_json(self._nodes.attributes(prefix))
        self.counts = {counts.name: counts for counts in self.spec.layers}

    def layer(self, layer: LayerSpec, statistics: tuple[str, ...]) -> LayerStats:
        """The sums of one layer."""
        counts = self.counts.get(layer.name)
        if counts is None:
            raise StoreError(f"{self._prefix} holds no sums of {layer.name}: it is damaged")
        return LayerStats(  # what belongs to another layer is read with that one
            arrays={
                name: self._nodes.array(
                    f"{self._prefix}/{layer.name}/{name}", layer.statistic_shape(name), "float32"
                )
                for name in layer.own(statistics)
            },
            num_samples=counts.num_samples,
            num_tokens=counts.num_tokens,
        )


def begun_shards(store: Path) -> set[Shard]:
    """The shards of which a store holds a folder, finished or not."""
    names = [path.name for path in (store / PARTIAL).glob("*-of-*") if path.is_dir()]
    found = set[Shard]()
    for name in names:
        with suppress(InputError):  # another folder
            found.add(Shard.parse(name.replace("-of-", "/")))
    return found
