"""Second moments made fit to solve with: what it costs to change a layer's weights.

    input   ‖(W − Ŵ) Xᵀ‖², by H = Σ x xᵀ alone: the layer's own output must stay
    kfac    Σ ⟨dy, (W − Ŵ) x⟩² ≈ tr(S (W − Ŵ) H (W − Ŵ)ᵀ), with S = Σ dy dyᵀ: the loss must stay
            (Kronecker-factored Fisher information: Martens & Grosse, 2015; used to prune language
            models by van der Ouderaa et al., 2024)

Both come from the dense model. Shapes: O out, I in, N either.
"""

import math
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from gradpipe.errors import GradpipeError

_INPUT_DAMPING = 0.01  # of the mean of the diagonal, as SparseGPT has it
_OUTPUT_DAMPING = 0.1  # gradients are noisier: docs/decisions/0010
_RETRIES = 3
_MORE = 10.0
_LEAST_EXPONENT = -126  # of a normal float32


@dataclass(slots=True)
class Curvature:
    """Damped, positive definite second moments of one layer, each in a unit of its own."""

    hessian: Tensor  # (I, I)
    cov: Tensor | None  # (O, O); None: the identity
    free: Tensor  # bool, (O, I) or (1, I): weights that cost nothing, but for the damping
    notes: list[str] = field(default_factory=list)  # messages for the user

    @classmethod
    def of(cls, name: str, hessian_II: Tensor, cov_OO: Tensor | None) -> Self:
        """Damp a layer's second moments; GradpipeError if they stay singular.

        Each is used up.
        """
        notes: list[str] = []
        free = _dead(f"{name}: {{}} inputs are always zero", hessian_II, notes)[None]
        if cov_OO is not None:
            dead_O = _dead(f"{name}: {{}} outputs have no gradient", cov_OO, notes)
            free = free | dead_O[:, None]
        damped_II = _damped(f"{name}: hessian", _near_one(hessian_II), _INPUT_DAMPING, notes)
        damped_OO = None
        if cov_OO is not None:
            damped_OO = _damped(f"{name}: grad_cov", _near_one(cov_OO), _OUTPUT_DAMPING, notes)
        return cls(damped_II, damped_OO, free, notes)

    def inverse_factor(self) -> Tensor:
        """The upper Cholesky factor U of H⁻¹ = UᵀU, (I, I).

        Turned around in both directions, H has a lower factor whose inverse, turned back, is U. So
        only H itself is factored, which is known to succeed, and never its inverse.
        """
        lower_II = torch.linalg.cholesky(self.hessian.flip(0, 1))
        identity_II = torch.eye(len(lower_II), device=lower_II.device)
        inverse_II: Tensor = torch.linalg.solve_triangular(lower_II, identity_II, upper=False)
        return inverse_II.flip(0, 1)

    def times(self, change_OI: Tensor) -> Tensor:
        """S · change · H, half the gradient of the cost."""
        product_OI = change_OI @ self.hessian
        return product_OI if self.cov is None else self.cov @ product_OI

    def diagonal(self) -> Tensor:
        """The curvature of each weight alone, (O, I) or (1, I)."""
        diagonal_1I = self.hessian.diagonal()[None]
        if self.cov is None:
            return diagonal_1I
        return self.cov.diagonal()[:, None] * diagonal_1I


def _dead(what: str, matrix_NN: Tensor, notes: list[str]) -> Tensor:
    """Which of N are zero in every sample, by the diagonal, (N,); none if all are.

    Damping would give them a price, so they are looked for before.
    """
    dead_N = matrix_NN.diagonal() == 0
    count = int(dead_N.sum())
    if count in (0, len(dead_N)):
        return torch.zeros_like(dead_N)
    notes.append(what.format(f"{count} of {len(dead_N)}") + ": their weights cost nothing")
    return dead_N


def _near_one(matrix_NN: Tensor) -> Tensor:
    """The matrix times the power of 4 that brings its mean diagonal near 1, in place.

    What is solved for does not depend on it, to the bit, roots included; but products of two second
    moments, of squares of weights, stay numbers that float32 has.
    """
    exponent = max(math.frexp(float(matrix_NN.diagonal().mean()))[1], _LEAST_EXPONENT)
    return matrix_NN.mul_(2.0 ** (-exponent // 2 * 2))


def _damped(what: str, matrix_NN: Tensor, share: float, notes: list[str]) -> Tensor:
    """The matrix with a share of its mean diagonal added to it, more if that is not enough."""
    mean = float(matrix_NN.diagonal().mean())
    if mean == 0:
        notes.append(f"{what} is all zeros: every direction counts the same")
        matrix_NN.diagonal().add_(1.0)
        return matrix_NN
    added = 0.0
    for attempt in range(_RETRIES + 1):
        wanted = share * _MORE**attempt * mean
        matrix_NN.diagonal().add_(wanted - added)
        added = wanted
        if attempt:
            notes.append(f"{what} is ill-conditioned: damped by {share * _MORE**attempt:g}")
        if int(torch.linalg.cholesky_ex(matrix_NN).info) == 0:
            return matrix_NN
    raise GradpipeError(
        f"{what} is not positive definite, damped by {share * _MORE**_RETRIES:g} of its mean "
        "diagonal: its values are NaN, infinite or not a second moment; collect it again"
    )
