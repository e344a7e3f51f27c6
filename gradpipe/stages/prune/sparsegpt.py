"""Optimal brain surgery column by column: SparseGPT, and its update for a mask that is given.

Frantar & Alistarh, 2023, algorithm 1: columns are fixed from left to right; what a column loses,
those to its right make up for. With U the upper Cholesky factor of H⁻¹, a pruned weight w in
column j costs w² / U_jj², and moves the rest of its row by −w / U_jj · U_j.

Shapes: O out, I in, C columns of a part.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

import torch
from torch import Tensor

from gradpipe.stages.prune.mask import highest_of, lowest_mask, pattern_mask
from gradpipe.stages.prune.solver import LayerProblem, UpdateKept
from gradpipe.stages.prune.target import Budget, Pattern

_COLUMNS = 128

_FEW = 16  # columns that are charged one by one; to all others errors go by products

Select = Callable[[Tensor, int], Tensor]  # scores of columns (C, O), the first's index -> kept


class SparseGpt:
    """The solver: weights that cost nothing go first, and stay as they are if they are kept."""

    def __init__(self, problem: LayerProblem) -> None:
        self._weight_OI, self._free = problem.weight, problem.curvature.free
        self._factor_II = problem.curvature.inverse_factor()
        self._costly_OI = self._weight_OI.masked_fill(self._free, 0.0)

    def to(self, budget: Budget) -> tuple[Tensor, Tensor]:
        """Weights, in the factor's dtype, and mask, (O, I)."""
        updated_OI, mask_OI = sparsegpt(
            self._costly_OI, self._factor_II, budget.sparsity, budget.pattern
        )
        return updated_OI.where(~self._free, self._weight_OI.to(updated_OI.dtype)), mask_OI


def obs_updater(problem: LayerProblem) -> UpdateKept:
    """The update of any mask: the sweep with nothing to choose."""
    weight_OI, factor_II = problem.weight, problem.curvature.inverse_factor()
    return lambda mask_OI: obs_update(weight_OI, mask_OI, factor_II)


def sparsegpt(
    weight_OI: Tensor, factor_II: Tensor, sparsity: Fraction, pattern: Pattern | None
) -> tuple[Tensor, Tensor]:
    """Pick and update together; returns the weights, in the factor's dtype, and the mask, (O, I).

    Unstructured, one threshold for each 128 columns over all rows; the counts add up to
    ⌊sparsity · O · I⌋. A pattern is decided where its m columns begin.
    """
    rows = weight_OI.shape[0]

    def lowest(scores_CO: Tensor, start: int) -> Tensor:
        end = start + len(scores_CO)
        count = int(sparsity * rows * end) - int(sparsity * rows * start)
        return lowest_mask(scores_CO.T, count).T

    if pattern is None:
        return _sweep(weight_OI, factor_II, lowest, _COLUMNS)
    return _sweep(weight_OI, factor_II, lambda scores, _: _one_group(scores, pattern), pattern.m)


def _one_group(scores_CO: Tensor, pattern: Pattern) -> Tensor:
    """A pattern's mask of its m columns, (C, O)."""
    if pattern.m > _FEW:
        return pattern_mask(scores_CO.T, pattern).T
    return highest_of(scores_CO, pattern.n)


def obs_update(weight_OI: Tensor, mask_OI: Tensor, factor_II: Tensor) -> Tensor:
    """Update the kept weights for a mask chosen by other means, (O, I)."""

    def given(scores_CO: Tensor, start: int) -> Tensor:
        return mask_OI[:, start : start + len(scores_CO)].T

    return _sweep(weight_OI, factor_II, given, _COLUMNS)[0]


def _sweep(
    weight_OI: Tensor, factor_II: Tensor, select: Select, width: int
) -> tuple[Tensor, Tensor]:
    """Decide every `width` columns; hand errors on to the right, lazily, a part at a time.

    Turned around, so that a column is contiguous.
    """
    turned_IO = weight_OI.T.clone(memory_format=torch.contiguous_format)
    updated_IO = turned_IO.to(factor_II.dtype)  # in two steps: torch is slow at both in one
    mask_IO = torch.ones_like(updated_IO, dtype=torch.bool)
    step = max(_COLUMNS // width, 1) * width  # a whole number of decisions
    for start in range(0, len(updated_IO), step):
        part, right = slice(start, start + step), slice(start + step, None)
        columns = _Part.of(part, updated_IO, mask_IO, factor_II)
        columns.sweep(select, width)
        updated_IO[right].addmm_(factor_II[part, right].T, columns.error, alpha=-1)
    return updated_IO.T.contiguous(), mask_IO.T.contiguous()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Columns that are fixed in place before any right of them hears of it."""

    start: int  # the first column
    weight: Tensor  # (C, O), as the next three
    kept: Tensor
    share: Tensor  # 1 / U_jj of a weight that goes, 0 of one that stays
    error: Tensor  # what each column lost, over U_jj
    factor: Tensor  # (C, C)

    @classmethod
    def of(cls, columns: slice, weight_IO: Tensor, kept_IO: Tensor, factor_II: Tensor) -> Self:
        """Some columns, as views, nothing decided yet."""
        weight_CO = weight_IO[columns]
        return cls(
            start=columns.start,
            weight=weight_CO,
            kept=kept_IO[columns],
            share=torch.empty_like(weight_CO),
            error=torch.empty_like(weight_CO),
            factor=factor_II[columns, columns],
        )

    def sweep(self, select: Select, width: int) -> None:
        """Fix all columns; where `width` of them begin, they have been charged with all errors."""
        step = max(_FEW // width, 1) * width
        for first in range(0, len(self.weight), step):
            end = min(first + step, len(self.weight))
            self._charge(first, end, 0)
            for start in range(first, end, _FEW):
                few = range(start, min(start + _FEW, end))
                self._charge(few.start, few.stop, first)
                for j in few:
                    if j % width == 0:
                        self._decide(select, slice(j, j + width))
                    self._fix(j, few.stop)
        self.weight.mul_(self.kept)

    def _charge(self, start: int, end: int, since: int) -> None:
        """Charge columns with the errors of those from `since` on, by one product."""
        factor_CC = self.factor[since:start, start:end]
        self.weight[start:end].addmm_(factor_CC.T, self.error[since:start], alpha=-1)

    def _decide(self, select: Select, ahead: slice) -> None:
        diagonal_C1 = self.factor.diagonal()[ahead, None]
        scores_CO = (self.weight[ahead] / diagonal_C1).square_()
        self.kept[ahead] = select(scores_CO, self.start + ahead.start)
        torch.div(~self.kept[ahead], diagonal_C1, out=self.share[ahead])

    def _fix(self, j: int, end: int) -> None:
        """Note one column's error, and charge it to the next few, up to `end`."""
        torch.mul(self.weight[j], self.share[j], out=self.error[j])
        self.weight[j + 1 : end].addr_(self.factor[j, j + 1 : end], self.error[j], alpha=-1)
