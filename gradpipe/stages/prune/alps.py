"""Least squares on a mask, and the masks that least squares would choose.

`least_squares` moves the kept weights to the minimum of the curvature's cost, by preconditioned
conjugate gradients on all rows at once. `alps_mask` looks for the support itself: ADMM between the
cost and the constraint (ALPS: Meng et al., 2024), in the eigenbasis of both second moments, where
each step is four products of matrices, whatever the curvature.

Shapes: O out, I in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gradpipe.stages.prune.curvature import Curvature
from gradpipe.stages.prune.least_squares import least_squares
from gradpipe.stages.prune.mask import budget_mask
from gradpipe.stages.prune.solver import LayerProblem
from gradpipe.stages.prune.target import Budget

_ITERATIONS = 60
_FIRST_PENALTY = 0.1
_EVERY = 3  # iterations between looks at the support
_PENALTY_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # (left and joined ÷ support, factor)


class Alps:
    """The solver: ADMM's support, then least squares on it; what costs nothing goes first."""

    def __init__(self, problem: LayerProblem) -> None:
        """Decompose the layer's curvature."""
        self._weight_OI, self._group = problem.weight, problem.group
        self._curvature = problem.curvature
        self._basis = Eigenbasis.of(problem.curvature)

    def to(self, budget: Budget) -> tuple[Tensor, Tensor]:
        """Weights, in their own dtype, and mask, (O, I)."""

        def select(score_OI: Tensor) -> Tensor:
            score_OI = score_OI.masked_fill(self._curvature.free, 0.0)
            return budget_mask(score_OI, budget, self._group)

        mask_OI = alps_mask(self._weight_OI, self._basis, select)
        return least_squares(self._weight_OI, mask_OI, self._curvature), mask_OI


@dataclass(frozen=True, slots=True)
class Eigenbasis:
    """The curvature scaled to a unit diagonal, in the basis where it is diagonal.

    Scaling makes one penalty fit all weights, and the size of a scaled weight its cost alone.
    """

    scale: Tensor  # scaled weight = weight · scale; (O, I) or (1, I)
    values: Tensor  # eigenvalues, (O, I) or (1, I)
    right: Tensor  # (I, I)
    left: Tensor | None  # (O, O)

    @classmethod
    def of(cls, curvature: Curvature) -> Self:
        """Decompose a layer's curvature; dear, and the same for every sparsity."""
        values_I, right_II = _eigen(curvature.hessian)
        scale_OI = curvature.diagonal().sqrt()
        if curvature.cov is None:
            return cls(scale_OI, values_I[None], right_II, None)
        values_O, left_OO = _eigen(curvature.cov)
        return cls(scale_OI, values_O[:, None] * values_I, right_II, left_OO)

    def enter(self, matrix_OI: Tensor) -> Tensor:
        """Change to the basis."""
        matrix_OI = matrix_OI @ self.right
        return matrix_OI if self.left is None else self.left.T @ matrix_OI

    def leave(self, matrix_OI: Tensor) -> Tensor:
        """Change back."""
        matrix_OI = matrix_OI @ self.right.T
        return matrix_OI if self.left is None else self.left @ matrix_OI


def _eigen(matrix_NN: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a matrix scaled to a unit diagonal."""
    roots_N = matrix_NN.diagonal().sqrt()
    values_N, vectors_NN = torch.linalg.eigh(matrix_NN / roots_N / roots_N[:, None])
    return values_N.clamp_min(0), vectors_NN


def alps_mask(weight_OI: Tensor, basis: Eigenbasis, select: Callable[[Tensor], Tensor]) -> Tensor:
    """The support that ADMM settles on, (O, I); `select` turns scores into a mask.

    Meng et al., 2024, algorithm 1, without its last step, which `least_squares` is.
    """
    dense_OI = weight_OI.to(basis.scale.dtype) * basis.scale
    target_OI = basis.values * basis.enter(dense_OI)
    penalty = _FIRST_PENALTY
    sparse_OI, dual_OI = dense_OI.clone(), torch.zeros_like(dense_OI)
    support_OI = None
    for iteration in range(1, _ITERATIONS + 1):
        pull_OI = target_OI + basis.enter(penalty * sparse_OI - dual_OI)
        free_OI = basis.leave(pull_OI / (basis.values + penalty))
        candidate_OI = free_OI + dual_OI / penalty
        mask_OI = select(candidate_OI.abs())
        sparse_OI = candidate_OI * mask_OI
        dual_OI += penalty * (free_OI - sparse_OI)
        if iteration % _EVERY == 0:
            if support_OI is not None:
                moved = int((mask_OI ^ support_OI).sum()) / max(int(mask_OI.sum()), 1)
                if moved == 0:
                    break
                penalty *= next(factor for least, factor in _PENALTY_GROWTH if moved >= least)
            support_OI = mask_OI
    return mask_OI
