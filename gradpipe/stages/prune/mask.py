"""Masks: which weights stay. True = kept.

Pure functions of a score and a pattern. Counts are exact, ties go to the lower index: the same
scores give the same mask on every device.

Shapes: O out, I in.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from gradpipe.stages.prune.target import Budget, Group, Pattern

_SELECT_VALUES = 1 << 17  # compared at a time: they stay in a core's own cache
_VECTOR_WIDTH = 16  # from here on NumPy, which selects with vector instructions, is faster on a CPU


def budget_mask(score_OI: Tensor, budget: Budget, group: Group) -> Tensor:
    """The mask of a budget, (O, I): by its pattern, or its share of each group."""
    if budget.pattern is not None:
        return pattern_mask(score_OI, budget.pattern)
    return unstructured_mask(score_OI, budget.sparsity, group)


def budget_masks(score_OI: Tensor, budgets: Sequence[Budget], group: Group) -> list[Tensor]:
    """The mask of each budget; those that compare whole rows share what finds their thresholds."""
    shares = [x.sparsity for x in budgets if x.pattern is None]
    if len(shares) < 2 or group != Group(0):
        return [budget_mask(score_OI, budget, group) for budget in budgets]
    shared = iter(_keep_highest(score_OI, shares))
    return [
        next(shared) if x.pattern is None else pattern_mask(score_OI, x.pattern) for x in budgets
    ]


def unstructured_mask(score_OI: Tensor, sparsity: Fraction, group: Group) -> Tensor:
    """Prune the ⌊sparsity · group size⌋ lowest scores of each group."""
    if group.axis is None:
        return _keep_highest(score_OI.reshape(1, -1), [sparsity])[0].view_as(score_OI)
    if group.axis == 1 and group.size == 1:
        return _mask_rows(score_OI.T.contiguous(), sparsity, 1).T
    if group.axis == 1:
        return _mask_columns(score_OI, sparsity, group.size)
    return _mask_rows(score_OI, sparsity, group.size)


def pattern_mask(score_OI: Tensor, pattern: Pattern) -> Tensor:
    """Keep the `n` highest scores of every `m` consecutive inputs."""
    groups = score_OI.reshape(-1, pattern.m)
    return _keep_highest(groups, [pattern.sparsity])[0].view_as(score_OI)


def lowest_mask(scores: Tensor, count: int) -> Tensor:
    """False at the `count` lowest of all, ties to the lower index."""
    return _keep_rows(scores.reshape(1, -1), [count])[0].view_as(scores)


def _mask_rows(score_OI: Tensor, sparsity: Fraction, size: int) -> Tensor:
    """Groups of `size` rows; the last may be smaller."""
    whole = score_OI.shape[0] - score_OI.shape[0] % size
    parts = _keep_highest(score_OI[:whole].reshape(-1, size * score_OI.shape[1]), [sparsity])
    if whole < score_OI.shape[0]:
        parts += _keep_highest(score_OI[whole:].reshape(1, -1), [sparsity])
    return torch.cat([part.reshape(-1, score_OI.shape[1]) for part in parts])


def _mask_columns(score_OI: Tensor, sparsity: Fraction, size: int) -> Tensor:
    """Groups of `size` columns over all rows, flattened row by row so that ties fall as said."""
    columns = score_OI.split(size, dim=1)
    masks = [_keep_highest(part.reshape(1, -1), [sparsity])[0].view_as(part) for part in columns]
    return torch.cat(masks, dim=1)


def _keep_highest(scores_GN: Tensor, sparsities: Sequence[Fraction]) -> list[Tensor]:
    """Per row, for each: False at the ⌊sparsity · N⌋ lowest, ties to the lower index."""
    counts = [scores_GN.shape[1] * x.numerator // x.denominator for x in sparsities]
    parts = scores_GN.split(max(1, _SELECT_VALUES // scores_GN.shape[1]))
    masks = zip(*(_keep_rows(part, counts) for part in parts), strict=True)
    return [some[0] if len(some) == 1 else torch.cat(some) for some in masks]


def _thresholds(scores_GN: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Per row, for each count: the score of that rank from below, (G, 1)."""
    if scores_GN.is_cuda or scores_GN.shape[1] < _VECTOR_WIDTH:
        return [scores_GN.kthvalue(max(x, 1), dim=1, keepdim=True).values for x in counts]
    places = [max(count, 1) - 1 for count in counts]
    if len(places) == 1:
        ordered = np.partition(scores_GN.numpy(), places[0], axis=1)
    else:  # costs less than two partitions
        ordered = np.sort(scores_GN.numpy(), axis=1)
    return [torch.from_numpy(ordered[:, place, None].copy()) for place in places]


def _keep_rows(scores_GN: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Per row, for each count: False at so many lowest."""
    thresholds = _thresholds(scores_GN, counts)
    return [_above(scores_GN, x, count) for x, count in zip(thresholds, counts, strict=True)]


def _above(scores_GN: Tensor, threshold_G1: Tensor, count: int) -> Tensor:
    """Per row: False at the `count` lowest, of which the threshold is the highest."""
    if count == 0:
        return torch.ones_like(scores_GN, dtype=torch.bool)
    kept = scores_GN > threshold_G1
    missing = scores_GN.numel() - count * len(scores_GN) - int(kept.count_nonzero())
    if missing:  # at least so many go, so that some rows have more ties than should go
        wanted_G1 = count - (scores_GN < threshold_G1).sum(dim=1, keepdim=True)
        ties = scores_GN == threshold_G1
        kept |= ties & (ties.cumsum(dim=1) > wanted_G1)
    return kept
