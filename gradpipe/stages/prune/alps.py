"""The masks that least squares would choose, and the weights on them.

`alps` looks for the support: ADMM between the cost and the constraint (ALPS: Meng et al., 2024), in
the eigenbasis of both second moments, where each step is four products of matrices (two under
`input`). It is over-relaxed (Boyd et al., 2011, section 3.4.3), which takes half of the steps to
supports as good (docs/decisions/0016, 0020). The weights that it ends with are nearly those of
least cost on their support: `least_squares` goes the rest of the way.

Shapes: O out, I in.
"""

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

_STEPS = 18
_PENALTIES = tuple(0.2 * 4 ** (step / (_STEPS - 1)) for step in range(_STEPS))  # 0.2 to 0.8
_RELAXATION = 1.3
_LEAST_GAIN = 1e-3  # of the cost: what a last step of least squares has brought


class Alps:
    """The solver: ADMM's support, then least squares on it; what costs nothing goes first."""

    def __init__(self, problem: LayerProblem) -> None:
        self._weight_OI, self._group = problem.weight, problem.group
        self._curvature = problem.curvature
        self._basis = Eigenbasis.of(problem.curvature)

    def to(self, budget: Budget) -> tuple[Tensor, Tensor]:
        """Weights, in their own dtype, and mask, (O, I)."""

        def select(score_OI: Tensor) -> Tensor:
            score_OI = score_OI.masked_fill(self._curvature.free, 0.0)
            return budget_mask(score_OI, budget, self._group)

        found_OI, mask_OI = alps(self._weight_OI, self._basis, select)
        start_OI = found_OI.where(~self._curvature.free, self._weight_OI.to(found_OI.dtype))
        updated_OI = least_squares(self._weight_OI, mask_OI, self._curvature, start_OI, _LEAST_GAIN)
        return updated_OI, mask_OI


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
        """Decompose a layer's curvature; expensive, and the same for every sparsity."""
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


def alps(
    weight_OI: Tensor, basis: Eigenbasis, select: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Weights, in the basis' dtype, and the support that ADMM ends with, both (O, I).

    `select` turns scores into a mask. Meng et al., 2024, algorithm 1, with penalties that do not
    wait for the support, and without its last step, which `least_squares` is. What the mask keeps
    of a candidate is the sparse weight, and what it drops is the dual over the penalty.
    """
    dense_OI = weight_OI.to(basis.scale.dtype) * basis.scale
    target_OI = basis.values * basis.enter(dense_OI)
    candidate_OI, before = dense_OI, _PENALTIES[0]
    for penalty in _PENALTIES:
        mask_OI = select(candidate_OI.abs())
        pull_OI = candidate_OI * torch.where(mask_OI, penalty, -before)
        pull_OI = basis.enter(pull_OI).add_(target_OI).div_(basis.values + penalty)
        candidate_OI = candidate_OI * torch.where(mask_OI, 1 - _RELAXATION, before / penalty)
        candidate_OI.add_(basis.leave(pull_OI), alpha=_RELAXATION)
        before = penalty
    return candidate_OI / basis.scale, select(candidate_OI.abs())
