"""Shards to one store: sums added in the order of the shards, whoever merges them, and encoded."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import reduce
from pathlib import Path

from gradpipe.errors import InputError, StoreError
from gradpipe.store.folder import LOCK_NAME, Calibration, is_begun, is_complete, read_begun, tidy
from gradpipe.store.lock import locked
from gradpipe.store.reader import GradientStore
from gradpipe.store.schema import StoreSpec
from gradpipe.store.shard import Shard
from gradpipe.store.snapshots import Snapshot, Snapshots, begun_shards
from gradpipe.store.statistics import LayerStats
from gradpipe.store.writer import StoreWriter


def merge(stores: Path | str | Sequence[Path | str]) -> GradientStore:
    """Add up the shards of one collection, and finish the first store.

    Args:
        stores: The store to finish, and others with more of its shards, which stay as they are.

    Returns:
        The finished store: the same bytes whoever merges, and in whatever order stores are given.

    Raises:
        InputError: If the stores are not of one collection, or if a shard is there twice.
        StoreError: If a shard is missing or unfinished.

    Example:
        >>> from pathlib import Path
        >>> from gradpipe import CollectConfig, DataConfig, Shard, collect_shard, merge
        >>> for index in (0, 1):
        ...     config = CollectConfig(
        ...         model="embedded",
        ...         store=Path(f"part-{index}"),
        ...         data=DataConfig(name="stdlib"),
        ...         num_samples=4,
        ...         seq_len=32,
        ...         shard=Shard(index, 2),
        ...     )
        ...     unfinished = collect_shard(config)
        >>> merge([Path("part-0"), Path("part-1")]).spec.samples.num_samples
        4

    """
    homes = [Path(x) for x in ([stores] if isinstance(stores, str | Path) else stores)]
    if not homes:
        raise InputError("no stores to merge: give the one to finish first")
    target, *others = homes
    _check_unfinished(target)
    for store in homes:
        if not is_begun(store):
            raise InputError(
                f"{store} is no unfinished store: expected one that collect-grads --shard wrote"
            )
    with locked(target / LOCK_NAME, of=target, wait=True):
        _check_unfinished(target)  # another merge may have been faster
        spec, _ = read_begun(target)
        for other in others:
            theirs, _ = read_begun(other)
            check_same(target, spec, theirs)
            if theirs.samples != spec.samples:
                raise InputError(
                    f"stores {target} and {other} were begun with different samples: collect all "
                    "shards from the same data"
                )
        return finalize(target, others)


def _check_unfinished(store: Path) -> None:
    if is_complete(store):
        tidy(store)  # an earlier merge may have been killed over it
        raise InputError(f"store {store} is complete: there is nothing to merge into it")


def check_same(store: Path, spec: StoreSpec, other: StoreSpec) -> None:
    """Refuse to go on with a collection of other settings; samples are the store's own."""
    for f in dataclasses.fields(StoreSpec):
        mine, theirs = getattr(spec, f.name), getattr(other, f.name)
        if mine != theirs and f.name != "samples":
            shown = "" if f.name == "layers" else f" ({theirs!s:.200} there, {mine!s:.200} now)"
            raise InputError(
                f"store {store} was begun with another {f.name}{shown}: "
                "give the same command, another store or --overwrite"
            )


def finalize(folder: Path, others: Sequence[Path] = ()) -> GradientStore:
    """Add up the shards in `folder`, whose lock the caller holds, and commit the store.

    Shards may also lie in `others`, which are only read.
    """
    spec, calibration = read_begun(folder)
    homes = _homes((folder, *others), spec)
    if not homes:
        raise StoreError(f"store {folder} holds no shard: run collect-grads --shard on it")
    if missing := [shard for shard, home in homes.items() if home is None]:
        names = ", ".join(f"{shard.index}/{shard.count}" for shard in missing)
        raise StoreError(
            f"store {folder} lacks shard {names}: run collect-grads --shard for it, then merge"
        )
    with ExitStack() as held:
        for shard in homes:  # one that is run again is waited for: it may be reading its sums
            held.enter_context(locked(Snapshots(folder, shard).lock, of=folder, wait=True))
        return _add_up(folder, spec, calibration, homes)


def _add_up(
    folder: Path, spec: StoreSpec, calibration: Calibration, homes: Mapping[Shard, Path | None]
) -> GradientStore:
    writer = StoreWriter(folder, spec)
    writer.begin(calibration)
    sums = [_layer_index(home, spec, shard) for shard, home in homes.items() if home is not None]
    for layer in spec.layers:
        of_shards = (snapshots[layer.name].layer(layer, spec.statistics) for snapshots in sums)
        writer.write_layer(layer, reduce(LayerStats.merged, of_shards))
    writer.commit()
    return GradientStore.open(folder)


def is_last(folder: Path) -> bool:
    """True if every shard that the store is made of is finished."""
    return all(_homes((folder,), read_begun(folder)[0]).values())


def _homes(folders: Sequence[Path], spec: StoreSpec) -> dict[Shard, Path | None]:
    """Where each shard lies finished, None if nowhere; InputError if counts are mixed, or twice."""
    found = set[Shard]().union(*map(begun_shards, folders))
    counts = sorted({shard.count for shard in found})
    if len(counts) > 1:
        raise InputError(
            f"store {folders[0]} holds shards of {' and of '.join(map(str, counts))}: "
            "collect all of them with one N"
        )
    layers = {layer.name for layer in spec.layers}
    homes: dict[Shard, Path | None] = {}
    for shard in (Shard(index, count) for count in counts for index in range(count)):
        finished = [x for x in folders if _layer_index(x, spec, shard).keys() >= layers]
        if len(finished) > 1:
            raise InputError(
                f"shard {shard.index}/{shard.count} is both in {finished[0]} and in "
                f"{finished[1]}: its samples would count twice"
            )
        homes[shard] = finished[0] if finished else None
    return homes


def _snapshots(partial: Snapshots) -> Iterator[Snapshot]:
    """The shard's snapshots, less those that are damaged, or that its worker deletes just now."""
    for name in partial.names():
        with suppress(StoreError):
            yield partial.read(name)


def _layer_index(folder: Path, spec: StoreSpec, shard: Shard) -> dict[str, Snapshot]:
    """The snapshot that holds each layer's sums of all of the shard's samples."""
    share = tuple(shard.part_of(spec.samples.num_samples))
    return {
        name: snapshot
        for snapshot in _snapshots(Snapshots(folder, shard))
        if snapshot.spec.samples == share
        for name in snapshot.counts
    }
