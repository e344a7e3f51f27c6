"""Allocations: how a sparsity over all layers is shared out among them.

`owl` and `dlp` give each block a sparsity from how its scores are distributed; `global` lets all
weights compete; `sensitivity` goes three quarters of that way by the Fisher score. Whatever a rule
wishes for is moved so that the mean, weighted by the number of weights, is the sparsity asked for,
and then rounded to whole weights, rows or patterns, losing as little of that as can be.

Everything here is about a few numbers for each layer or block, without torch;
`gradpipe.stages.prune.score_passes` finds them.
"""

import math
from collections.abc import Hashable, Mapping
from itertools import pairwise
from typing import NamedTuple, TypeVar

Key = TypeVar("Key", bound=Hashable)
OWL_LAMBDA, OWL_OUTLIERS = 0.08, 5.0  # λ, M: Yin et al., 2024
DLP_ALPHAS = ((0.5, 0.04), (0.6, 0.1), (0.7, 0.15))  # sparsity, α: Chen et al., 2025, its scripts
SENSITIVITY = 0.75  # how far from uniform to global: docs/decisions/0021
_BISECTIONS = 100
_SUMS = 2048  # kept in a search for whole numbers: far more than blocks of a few sizes make
_ROUNDING = 1e-9  # what a whole number may lack, computed in floats


def owl(
    outliers: Mapping[Key, float],
    sizes: Mapping[Key, int],
    sparsity: float,
    spread: float = OWL_LAMBDA,
) -> dict[Key, float]:
    """Sparsities by OWL: blocks with more outliers keep more; equal shares are uniform.

    `outliers` is each block's share of scores above M times the block's mean; `spread` is λ.
    """
    return _spread(outliers, sizes, sparsity, 2 * spread)


def dlp(
    medians: Mapping[Key, float], sizes: Mapping[Key, int], sparsity: float
) -> dict[Key, float]:
    """Sparsities by DLP: a block whose median score is a small part of all keeps more."""
    total = sum(medians.values())
    importance = {key: 1 - (x / total if total else 0) for key, x in medians.items()}
    return _spread(importance, sizes, sparsity, 2 * dlp_alpha(sparsity))


def dlp_alpha(sparsity: float) -> float:
    """DLP's α: its scripts' where they give one; a line between, and beyond as at the nearest."""
    for (low, at_low), (high, at_high) in pairwise(DLP_ALPHAS):
        if sparsity <= high:
            part = max(sparsity - low, 0.0) / (high - low)
            return (1 - part) * at_low + part * at_high
    return DLP_ALPHAS[-1][1]


def _spread(
    keep: Mapping[Key, float], sizes: Mapping[Key, int], sparsity: float, width: float
) -> dict[Key, float]:
    """Map the least and the most to be kept `width` apart, around the target."""
    low, high = min(keep.values()), max(keep.values())
    span = high - low
    wish = {key: -width * ((x - low) / span if span else 0) for key, x in keep.items()}
    return shifted(wish, sizes, sparsity)


def shifted(
    wish: Mapping[Key, float], sizes: Mapping[Key, int], sparsity: float, ceiling: float = 1.0
) -> dict[Key, float]:
    """The wish moved by one number, clipped into [0, ceiling]: its weighted mean is `sparsity`."""
    total = sum(sizes.values())

    def clipped(shift: float) -> dict[Key, float]:
        return {key: min(max(x + shift, 0.0), ceiling) for key, x in wish.items()}

    def mean(values: Mapping[Key, float]) -> float:
        return math.fsum(values[key] * sizes[key] for key in values) / total

    low, high = -max(wish.values()), ceiling - min(wish.values())
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(clipped(middle)) < sparsity else (low, middle)
    return clipped(high)


def rounded(
    sparsities: Mapping[Key, float],
    sizes: Mapping[Key, int],
    steps: Mapping[Key, int],
    count: int,
) -> dict[Key, int]:
    """How many weights go of each, in multiples of its step: `count` in all, or just less.

    What rounding down leaves over goes to the largest remainders.
    """
    counts, remainders = {}, []
    for order, key in enumerate(sparsities):
        exact = sparsities[key] * sizes[key] / steps[key]
        whole = math.floor(exact + _ROUNDING)
        counts[key] = whole * steps[key]
        remainders.append((whole - exact, order, key))
    left = count - sum(counts.values())
    for _, _, key in sorted(remainders):
        if steps[key] <= left and counts[key] + steps[key] <= sizes[key]:
            counts[key] += steps[key]
            left -= steps[key]
    return counts


class _Choice(NamedTuple):
    """Whole parts of the first keys, ordered by how far they are from what was wished for."""

    distance: float  # squared, weighted by size
    parts: tuple[int, ...]


def whole_parts(
    sparsities: Mapping[Key, float], sizes: Mapping[Key, int], num_parts: int, goal: int
) -> dict[Key, int]:
    """How many parts of `num_parts` go of each, never all: whole numbers beside the sparsities.

    Their sum, weighted by size, is as near the goal as it can be; of all as near, they are those of
    least squared distance from the sparsities. One key after the other is added to the best choice
    for each sum; where many sizes make too many sums, the worst are left out.
    """
    best = {0: _Choice(0.0, ())}  # weighted sum of parts -> the best choice that comes to it
    for key, sparsity in sparsities.items():
        longer = _longer(best, sparsity * num_parts, sizes[key], num_parts)
        best = dict(sorted(longer.items(), key=lambda item: item[1])[:_SUMS])
    nearest = min(best, key=lambda total: (abs(total - goal), best[total]))
    return dict(zip(sparsities, best[nearest].parts, strict=True))


def _longer(
    best: Mapping[int, _Choice], wished: float, size: int, num_parts: int
) -> dict[int, _Choice]:
    """Every choice with one key more, which wishes for so many parts; the best for each sum."""
    near = math.floor(wished + _ROUNDING)
    longer: dict[int, _Choice] = {}
    for total, (distance, parts) in best.items():
        for part in range(max(near - 1, 0), min(near + 3, num_parts)):
            choice = _Choice(distance + size * (part - wished) ** 2, (*parts, part))
            new_total = total + part * size
            longer[new_total] = min(longer.get(new_total, choice), choice)
    return longer
