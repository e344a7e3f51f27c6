"""Shards to one store: sums added in the order of the shards, whoever merges them, and encoded."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gradpipe.errors import InputError, StoreError
from gradpipe.pipeline.command import check_same
from gradpipe.store.gradients import (
    LOCK_NAME,
    PARTIAL,
    GradientStore,
    LayerStats,
    StoreWriter,
    is_begun,
    is_complete,
    read_begun,
)
from gradpipe.store.lock import locked
from gradpipe.store.partial import Partial, Shard, Snapshot, add_stats
from gradpipe.store.schema import StoreSpec


def merge(stores: Sequence[Path], advance: Callable[[int], None] = lambda _: None) -> GradientStore:
    """Finish the first store from its own shards and those of the others, which stay as they are.

    Raises InputError if the stores are not of one collection, or if a shard is there twice;
    StoreError if one is missing or unfinished.
    """
    target = stores[0]
    if is_complete(target):
        raise InputError(f"store {target} is complete: there is nothing to merge into it")
    for store in stores:
        if not is_begun(store):
            raise InputError(
                f"{store} is no unfinished store: expected one that collect-grads --shard wrote"
            )
    with locked(target / LOCK_NAME, wait=True):
        spec, _ = read_begun(target)
        for other in stores[1:]:
            _gather(target, spec, other)
        return finalize(target, advance)


def finalize(folder: Path, advance: Callable[[int], None] = lambda _: None) -> GradientStore:
    """Add up the shards in `folder`, whose lock the caller holds, and commit the store."""
    spec, calibration = read_begun(folder)
    shards = shards_in(folder)
    if not shards:
        raise StoreError(f"store {folder} holds no shard: run collect-grads --shard on it")
    missing = [shard for shard in shards if not is_finished(folder, spec, shard)]
    if missing:
        names = ", ".join(f"{shard.index}/{shard.count}" for shard in missing)
        raise StoreError(
            f"store {folder} lacks shard {names}: run collect-grads --shard for it, then merge"
        )
    writer = StoreWriter(folder, spec)
    writer.begin(calibration)
    sums = [_layer_index(folder, shard) for shard in shards]
    for layer in spec.layers:
        total: LayerStats | None = None
        for snapshots in sums:
            total = add_stats(total, snapshots[layer.name].layer(layer, spec.statistics))
        assert total is not None  # there is at least one shard
        writer.write_layer(layer, total)
        advance(1)
    writer.commit()
    return GradientStore.open(folder)


def shards_in(folder: Path) -> tuple[Shard, ...]:
    """All shards that the store is made of, begun or not; InputError if counts are mixed."""
    names = [path.name for path in (folder / PARTIAL).iterdir() if path.is_dir()]
    found = [Shard.parse(name.replace("-of-", "/")) for name in names if "-of-" in name]
    counts = {shard.count for shard in found}
    if len(counts) > 1:
        raise InputError(
            f"store {folder} holds shards of {' and of '.join(map(str, sorted(counts)))}: "
            "collect all of them with one N"
        )
    return tuple(Shard(index, count) for count in counts for index in range(count))


def is_finished(folder: Path, spec: StoreSpec, shard: Shard) -> bool:
    """True if every layer has the sums of all of the shard's samples."""
    share = tuple(shard.share(spec.samples.num_samples))
    done = {
        name
        for snapshot in _snapshots(folder, shard)
        if snapshot.spec.samples == share
        for name in snapshot.counts
    }
    return done >= {layer.name for layer in spec.layers}


def _snapshots(folder: Path, shard: Shard) -> Iterator[Snapshot]:
    partial = Partial(folder, shard)
    return (partial.read(name) for name in partial.names())


def _layer_index(folder: Path, shard: Shard) -> dict[str, Snapshot]:
    """The snapshot that holds each layer."""
    return {name: snapshot for snapshot in _snapshots(folder, shard) for name in snapshot.counts}


def _gather(target: Path, spec: StoreSpec, other: Path) -> None:
    """Copy another store's shards into `target`, their commit records last."""
    check_same(target, spec, read_begun(other)[0])
    for shard in shards_in(other):
        source, copy = Partial(other, shard), Partial(target, shard)
        if not source.names():
            continue
        if copy.names():
            raise InputError(
                f"shard {shard.index}/{shard.count} is both in {target} and in {other}: "
                "its samples would count twice"
            )
        for name in source.names():
            source.read(name)
            shutil.copytree(source.folder / name, copy.folder / name, dirs_exist_ok=True)
            shutil.copyfile(source.folder / f"{name}.json", copy.folder / f"{name}.json")
