"""Sums of several ranks made one: each layer's, in the order of ranks, by the rank that owns it.

A layer's owner receives one rank's sums after the other and adds them as `merge` adds shards, so
that N ranks and N merged shards are the same bytes. Layers of a part are shared out by size: all
ranks receive, and then encode, at the same time.
"""

from collections.abc import Iterator, Sequence
from functools import reduce

import numpy as np
import torch

from gradpipe.pipeline.ranks import Ranks, shared_out
from gradpipe.stages.collect.sums import LayerAccumulator
from gradpipe.store.schema import LayerSpec
from gradpipe.store.statistics import LayerStats

Total = tuple[LayerSpec, LayerStats]


def added(
    ranks: Ranks, sums: Sequence[LayerAccumulator], statistics: tuple[str, ...], *, frees: bool
) -> Iterator[Total]:
    """The layers that are this rank's, and what all ranks have summed; `frees` the sums.

    A rank alone holds one layer on the host at a time; of several each holds its own layers'.
    """
    ordered = sorted(sums, key=lambda x: x.spec.num_weights)  # the largest needs most room
    if ranks.count == 1:
        for x in ordered:
            yield x.spec, x.result()
            if frees:
                x.free()
        return
    owned: list[Total] = []
    for x, owner in zip(
        ordered, shared_out([x.spec.num_weights for x in ordered], ranks.count), strict=True
    ):
        mine = x.result()
        if owner == ranks.index:
            owned.append((x.spec, _total(ranks, x.spec, mine, statistics)))
        else:
            _send(ranks, mine, x.spec.own(statistics), owner)
        if frees:
            x.free()
    while owned:
        yield owned.pop()


def _total(
    ranks: Ranks, layer: LayerSpec, mine: LayerStats, statistics: tuple[str, ...]
) -> LayerStats:
    of_ranks = (
        mine if rank == ranks.index else _received(ranks, layer, statistics, rank)
        for rank in range(ranks.count)
    )
    return reduce(LayerStats.merged, of_ranks)


def _send(ranks: Ranks, stats: LayerStats, names: Sequence[str], to: int) -> None:
    ranks.send(np.array([stats.num_samples, stats.num_tokens]), to)
    for name in names:
        ranks.send(stats.arrays[name], to)


def _received(ranks: Ranks, layer: LayerSpec, statistics: tuple[str, ...], of: int) -> LayerStats:
    num_samples, num_tokens = ranks.received((2,), of, torch.int64).tolist()
    arrays = {
        name: ranks.received(layer.statistic_shape(name), of, torch.float32)
        for name in layer.own(statistics)
    }
    return LayerStats(arrays=arrays, num_samples=num_samples, num_tokens=num_tokens)
