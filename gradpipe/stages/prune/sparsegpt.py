"""Optimal brain surgery column by column: SparseGPT, and its update for a mask that is given.

Frantar & Alistarh, 2023, algorithm 1: columns are fixed from left to right; what a column loses,
those to its right make up for. With U the upper Cholesky factor of H⁻¹, a pruned weight w in
column j costs w² / U_jj², and moves the rest of its row by −w / U_jj · U_j.

Shapes: O out, I in, C columns of a part.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from gradpipe.stages.prune.mask import lowest_mask, pattern_mask
from gradpipe.stages.prune.solver import LayerProblem, UpdateKept
from gradpipe.stages.prune.target import Budget, Pattern

_COLUMNS = 128
Select = Callable[[Tensor, int], Tensor]  # scores of a part (O, C), its first column -> kept


class SparseGpt:
    """The solver: weights that cost nothing go first, and stay as they are if they are kept."""

    def __init__(self, problem: LayerProblem) -> None:
        """Factor the layer's inverse Hessian."""
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

    def lowest(scores_OC: Tensor, start: int) -> Tensor:
        end = start + scores_OC.shape[1]
        return lowest_mask(scores_OC, int(sparsity * rows * end) - int(sparsity * rows * start))

    if pattern is None:
        return _sweep(weight_OI, factor_II, lowest, _COLUMNS)
    return _sweep(weight_OI, factor_II, lambda scores, _: pattern_mask(scores, pattern), pattern.m)


def obs_update(weight_OI: Tensor, mask_OI: Tensor, factor_II: Tensor) -> Tensor:
    """Update the kept weights for a mask chosen by other means, (O, I)."""

    def given(scores_OC: Tensor, start: int) -> Tensor:
        return mask_OI[:, start : start + scores_OC.shape[1]]

    return _sweep(weight_OI, factor_II, given, _COLUMNS)[0]


def _sweep(
    weight_OI: Tensor, factor_II: Tensor, select: Select, width: int
) -> tuple[Tensor, Tensor]:
    """Decide every `width` columns; hand errors on to the right, lazily, a part at a time."""
    updated_OI = weight_OI.to(factor_II.dtype, copy=True)
    mask_OI = torch.ones_like(updated_OI, dtype=torch.bool)
    step = max(_COLUMNS // width, 1) * width  # a whole number of decisions
    for start in range(0, updated_OI.shape[1], step):
        end = min(start + step, updated_OI.shape[1])
        part_OC, kept_OC = updated_OI[:, start:end].clone(), mask_OI[:, start:end]
        error_OC = _sweep_part(
            part_OC, kept_OC, factor_II[start:end, start:end], select, width, start
        )
        updated_OI[:, start:end] = part_OC
        updated_OI[:, end:] -= error_OC @ factor_II[start:end, end:]
    return updated_OI, mask_OI


def _sweep_part(
    part_OC: Tensor, kept_OC: Tensor, factor_CC: Tensor, select: Select, width: int, start: int
) -> Tensor:
    """Fix a part's columns in place; returns what is owed to the columns right of it, (O, C)."""
    error_OC = torch.zeros_like(part_OC)
    diagonal_C = factor_CC.diagonal()
    for j in range(part_OC.shape[1]):
        if j % width == 0:
            ahead = slice(j, j + width)
            scores = (part_OC[:, ahead] / diagonal_C[ahead]).square()
            kept_OC[:, ahead] = select(scores, start + j)
        error_O = part_OC[:, j] * ~kept_OC[:, j] / diagonal_C[j]
        part_OC[:, j:] -= error_O[:, None] * factor_CC[j, j:]
        part_OC[:, j] *= kept_OC[:, j]
        error_OC[:, j] = error_O
    return error_OC
