"""Ranks among more scores than fit in memory: passes of counting, exact.

A float32's 32 bits, read as an integer, keep its order. The first pass counts scores by the upper
16 bits, which tells the bin of any rank; the second counts within those bins by the lower 16, which
tells the score itself. A third counts what lies below it, part by part. What is kept does not grow
with the number of scores, nor, but for a number each, with that of parts.
"""

import struct
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)
_BINS = 1 << 16
_FLIP = 0x7FFFFFFF  # all but the sign: turns the order of negative floats around
_CHUNK_VALUES = 1 << 20  # looked at together: as int64 they take twice the room


class Thresholds(Generic[Key]):
    """The scores of given ranks, and how many of each part's lie below them."""

    def __init__(
        self, scores: Callable[[], Iterable[tuple[Key, Tensor]]], ranks: Sequence[int]
    ) -> None:
        """Go twice through what `scores` yields by part; `ranks` are counted from 0."""
        self._scores = scores
        self._ranks = tuple(ranks)
        upper = torch.zeros(_BINS, dtype=torch.long)
        for bits in _all_bits(scores()):
            upper += torch.bincount(bits >> 16, minlength=_BINS).cpu()
        upto = upper.cumsum(dim=0)
        bins = [int(torch.searchsorted(upto, rank, right=True)) for rank in ranks]
        lower = [torch.zeros(_BINS, dtype=torch.long) for _ in ranks]
        for bits in _all_bits(scores()):
            for i, counts in zip(bins, lower, strict=True):
                inside = bits[bits >> 16 == i] & (_BINS - 1)
                counts.add_(torch.bincount(inside, minlength=_BINS).cpu())
        below = [int(upto[i - 1]) if i else 0 for i in bins]  # scores below the bin
        places = [
            int(torch.searchsorted(counts.cumsum(dim=0), rank - first, right=True))
            for counts, rank, first in zip(lower, ranks, below, strict=True)
        ]
        self.values = tuple(_score(i << 16 | place) for i, place in zip(bins, places, strict=True))

    def upto(self) -> list[dict[Key, int]]:
        """For each rank, how many of each part's scores have it or a lower one.

        Ties go in the order of parts. This is the third pass.
        """
        below: list[dict[Key, int]] = [{} for _ in self._ranks]
        equal: list[dict[Key, int]] = [{} for _ in self._ranks]
        for key, part in self._scores():
            for i, value in enumerate(self.values):
                below[i][key] = below[i].get(key, 0) + int((part < value).sum())
                equal[i][key] = equal[i].get(key, 0) + int((part == value).sum())
        for rank, counts, alike in zip(self._ranks, below, equal, strict=True):
            ties = rank + 1 - sum(counts.values())
            for key in counts:
                taken = min(ties, alike[key])
                counts[key] += taken
                ties -= taken
        return below


def _all_bits(scores: Iterable[tuple[Key, Tensor]]) -> Iterator[Tensor]:
    """Integers from 0 to 2³², in the scores' order, some at a time."""
    for _, part in scores:
        for some in part.flatten().split(_CHUNK_VALUES):
            bits = (some + 0.0).view(torch.int32)  # −0 becomes 0
            yield (bits ^ ((bits >> 31) & _FLIP)).long() + (1 << 31)


def _score(bits: int) -> float:
    signed = bits - (1 << 31)
    value: float = struct.unpack("<f", struct.pack("<i", signed ^ ((signed >> 31) & _FLIP)))[0]
    return value
