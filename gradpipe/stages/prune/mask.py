"""Masks: which weights stay. True = kept.

Pure functions of a score and a pattern. Counts are exact, ties go to the lower index: the same
scores give the same mask on every device.

Shapes: O out, I in.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from gradpipe.stages.prune.target import Budget, Group, Pattern

_SELECT_VALUES = 1 << 19

_VECTOR_WIDTH = 16  # from here on NumPy, which selects with vector instructions, is faster on a CPU


def budget_mask(score_OI: Tensor, budget: Budget, group: Group) -> Tensor:
    """The mask of a budget, (O, I): by its pattern, or its share of each group."""
    if budget.pattern is not None:
        return pattern_mask(score_OI, budget.pattern)
    return unstructured_mask(score_OI, budget.sparsity, group)


def unstructured_mask(score_OI: Tensor, sparsity: Fraction, group: Group) -> Tensor:
    """Prune the ⌊sparsity · group size⌋ lowest scores of each group."""
    if group.axis is None:
        return _keep_highest(score_OI.reshape(1, -1), sparsity).view_as(score_OI)
    if group.axis == 1 and group.size == 1:
        return _mask_rows(score_OI.T.contiguous(), sparsity, 1).T
    if group.axis == 1:
        return _mask_columns(score_OI, sparsity, group.size)
    return _mask_rows(score_OI, sparsity, group.size)


def pattern_mask(score_OI: Tensor, pattern: Pattern) -> Tensor:
    """Keep the `n` highest scores of every `m` consecutive inputs."""
    groups = score_OI.reshape(-1, pattern.m)
    return _keep_highest(groups, pattern.sparsity).view_as(score_OI)


def lowest_mask(scores: Tensor, count: int) -> Tensor:
    """False at the `count` lowest of all, ties to the lower index."""
    return _keep_rows(scores.reshape(1, -1), count).view_as(scores)


def _mask_rows(score_OI: Tensor, sparsity: Fraction, size: int) -> Tensor:
    """Groups of `size` rows; the last may be smaller."""
    whole = score_OI.shape[0] - score_OI.shape[0] % size
    parts = [_keep_highest(score_OI[:whole].reshape(-1, size * score_OI.shape[1]), sparsity)]
    if whole < score_OI.shape[0]:
        parts.append(_keep_highest(score_OI[whole:].reshape(1, -1), sparsity))
    return torch.cat([part.reshape(-1, score_OI.shape[1]) for part in parts])


def _mask_columns(score_OI: Tensor, sparsity: Fraction, size: int) -> Tensor:
    """Groups of `size` columns over all rows, flattened row by row so that ties fall as said."""
    columns = score_OI.split(size, dim=1)
    masks = [_keep_highest(part.reshape(1, -1), sparsity).view_as(part) for part in columns]
    return torch.cat(masks, dim=1)


def _keep_highest(scores_GN: Tensor, sparsity: Fraction) -> Tensor:
    """Per row: False at the ⌊sparsity · N⌋ lowest, ties to the lower index."""
    count = scores_GN.shape[1] * sparsity.numerator // sparsity.denominator
    num_rows = max(1, _SELECT_VALUES // scores_GN.shape[1])  # selecting takes four times their room
    return torch.cat([_keep_rows(part, count) for part in scores_GN.split(num_rows)])


def _threshold(scores_GN: Tensor, count: int) -> Tensor:
    """Per row: the `count`-th lowest, (G, 1)."""
    if scores_GN.is_cuda or scores_GN.shape[1] < _VECTOR_WIDTH:
        return scores_GN.kthvalue(count, dim=1, keepdim=True).values
    place = count - 1
    return torch.from_numpy(np.partition(scores_GN.numpy(), place, axis=1)[:, place, None])


def _keep_rows(scores_GN: Tensor, count: int) -> Tensor:
    """Per row: False at the `count` lowest."""
    if count == 0:
        return torch.ones_like(scores_GN, dtype=torch.bool)
    threshold_G1 = _threshold(scores_GN, count)
    pruned = scores_GN < threshold_G1
    ties = scores_GN == threshold_G1
    wanted_G1 = count - pruned.sum(dim=1, keepdim=True)
    if bool((ties.sum(dim=1, keepdim=True) > wanted_G1).any()):
        ties &= ties.cumsum(dim=1) <= wanted_G1
    return ~(pruned | ties)
