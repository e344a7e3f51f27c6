"""Masks: which weights stay. True = kept.

Pure functions of a score and a pattern. Counts are exact, ties go to the lower index: the same
scores give the same mask on every device.

Shapes: O out, I in.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradpipe.stages.prune.target import Budget, Group, Pattern

_Scores: TypeAlias = npt.NDArray[np.floating]
_SELECT_VALUES = 1 << 17  # compared at a time: they stay in a core's own cache
_FEW = 16  # scores of a pattern that are compared each with each
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
    if pattern.m > _FEW:
        return _keep_highest(groups, [pattern.sparsity])[0].view_as(score_OI)
    parts = groups.split(max(1, _SELECT_VALUES // pattern.m))
    kept = [_turned(highest_of(_turned(part), pattern.n)) for part in parts]
    return torch.cat(kept).view_as(score_OI)


def highest_of(scores_MG: Tensor, num_kept: int) -> Tensor:
    """Per column, of few scores: True at so many highest, ties to the lower index, (M, G).

    Kept are those that beat enough others: counting is faster than selecting. On a CPU, NumPy
    needs a fifth as long as torch.
    """
    if not scores_MG.is_cuda:
        return torch.from_numpy(_highest_on_cpu(scores_MG.numpy(), num_kept))
    beaten_MG = torch.zeros_like(scores_MG, dtype=torch.uint8)
    for j, other_G in enumerate(scores_MG):
        beaten_MG[:j] += scores_MG[:j] > other_G
        beaten_MG[j + 1 :] += scores_MG[j + 1 :] >= other_G
    return beaten_MG >= len(scores_MG) - num_kept


def _highest_on_cpu(scores_MG: _Scores, num_kept: int) -> npt.NDArray[np.bool_]:
    beaten_MG = np.zeros(scores_MG.shape, np.uint8)
    for j in range(1, len(scores_MG)):
        beats_JG = scores_MG[j] >= scores_MG[:j]
        np.add.reduce(beats_JG, axis=0, dtype=np.uint8, out=beaten_MG[j])
        beaten_MG[:j] += ~beats_JG
    return beaten_MG >= len(scores_MG) - num_kept


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
    scores = scores_GN.numpy()
    bits = scores.view(f"i{scores.itemsize}")
    keys = (
        bits if bits.min(initial=0) >= 0 else scores
    )  # the order is the same, and integers are no NaN
    is_one = len(places) == 1  # to sort costs less than to partition twice
    ordered = np.partition(keys, places[0], axis=1) if is_one else np.sort(keys, axis=1)
    ordered = ordered.view(scores.dtype)
    return [torch.from_numpy(ordered[:, place, None].copy()) for place in places]


def _keep_rows(scores_GN: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Per row, for each count: False at so many lowest."""
    thresholds = _thresholds(scores_GN, counts)
    return [_above(scores_GN, x, count) for x, count in zip(thresholds, counts, strict=True)]


def _above(scores_GN: Tensor, threshold_G1: Tensor, count: int) -> Tensor:
    """Per row: False at the `count` lowest, of which the threshold is the highest."""
    if count == 0:
        return torch.ones_like(scores_GN, dtype=torch.bool)
    kept = _greater(scores_GN, threshold_G1)
    missing = scores_GN.numel() - count * len(scores_GN) - int(kept.count_nonzero())
    if missing:  # at least so many go, so that some rows have more ties than should go
        wanted_G1 = count - (scores_GN < threshold_G1).sum(dim=1, keepdim=True)
        ties = scores_GN == threshold_G1
        kept |= ties & (ties.cumsum(dim=1) > wanted_G1)
    return kept


def _greater(a: Tensor, b: Tensor) -> Tensor:
    """Where a > b; on a CPU, NumPy needs half as long as torch."""
    return a > b if a.is_cuda else torch.from_numpy(a.numpy() > b.numpy())


def _turned(matrix: Tensor) -> Tensor:
    """Transposed and contiguous; on a CPU, NumPy needs a fifth as long as torch."""
    if matrix.is_cuda:
        return matrix.T.contiguous()
    return torch.from_numpy(np.ascontiguousarray(matrix.numpy().T))
