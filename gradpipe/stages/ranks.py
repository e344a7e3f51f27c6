"""Ranks among more scores than fit in memory: two passes of counting, exact.

A float32's 32 bits, read as an integer, keep its order. The first pass counts scores by the upper
16 bits, which tells the bin of any rank; the second counts within those bins by the lower 16.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)

_BINS = 1 << 16
_FLIP = 0x7FFFFFFF  # all but the sign: turns the order of negative floats around


class Ranks(Generic[Key]):
    """The scores of given ranks, and how many of each part's lie below them."""

    def __init__(
        self, scores: Callable[[], Iterable[tuple[Key, Tensor]]], ranks: Sequence[int]
    ) -> None:
        """Count twice what `scores` yields by part; `ranks` are counted from 0."""
        self._ranks = tuple(ranks)
        self._upper: dict[Key, Tensor] = {}  # counts by the upper bits
        for key, part in scores():
            _add(self._upper, key, _sortable(part) >> 16)
        upto = torch.stack(list(self._upper.values())).sum(dim=0).cumsum(dim=0)
        self._bins = [int(torch.searchsorted(upto, rank, right=True)) for rank in ranks]
        self._below = [int(upto[i - 1]) if i else 0 for i in self._bins]  # scores below the bin
        self._lower: list[dict[Key, Tensor]] = [{} for _ in ranks]  # counts within it
        for key, part in scores():
            bits = _sortable(part)
            for i, counts in zip(self._bins, self._lower, strict=True):
                _add(counts, key, bits[bits >> 16 == i] & (_BINS - 1))

    def value(self, index: int) -> float:
        """The score of the rank given at this index."""
        return _score(self._bins[index] << 16 | self._place(index))

    def upto(self, index: int) -> dict[Key, int]:
        """How many of each part's scores have that rank or a lower one, ties in order of parts."""
        place, lower = self._place(index), self._lower[index]
        counts = {
            key: int(upper[: self._bins[index]].sum() + lower[key][:place].sum())
            for key, upper in self._upper.items()
        }
        ties = self._ranks[index] + 1 - sum(counts.values())
        for key in counts:
            taken = min(ties, int(lower[key][place]))
            counts[key] += taken
            ties -= taken
        return counts

    def _place(self, index: int) -> int:
        """Where the score lies in its bin."""
        within = torch.stack(list(self._lower[index].values())).sum(dim=0).cumsum(dim=0)
        left = self._ranks[index] - self._below[index]
        return int(torch.searchsorted(within, left, right=True))


def _sortable(scores: Tensor) -> Tensor:
    """Integers from 0 to 2³², in the scores' order."""
    bits = (scores.flatten() + 0.0).view(torch.int32)  # −0 becomes 0
    return (bits ^ ((bits >> 31) & _FLIP)).long() + (1 << 31)


def _score(bits: int) -> float:
    """The score of such an integer."""
    signed = bits - (1 << 31)
    value: float = struct.unpack("<f", struct.pack("<i", signed ^ ((signed >> 31) & _FLIP)))[0]
    return value


def _add(counts: dict[Key, Tensor], key: Key, places: Tensor) -> None:
    new = torch.bincount(places, minlength=_BINS).cpu()
    counts[key] = counts[key] + new if key in counts else new
