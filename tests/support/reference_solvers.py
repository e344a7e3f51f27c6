"""SparseGPT, least squares and ALPS in the plainest way: a dense solve at every step.

Slow on purpose, and independent: it imports nothing of the package under test. Follows SparseGPT
(Frantar and Alistarh 2023) and ALPS (Meng et al. 2024).

Shapes: a weight is (out, in); a Hessian is (in, in), float64, damped already; a cost matrix over
outputs is (out, out).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def damped(matrix: Tensor, share: float) -> Tensor:
    """Add a share of the mean diagonal to the diagonal."""
    return matrix.double() + share * matrix.diagonal().double().mean() * torch.eye(len(matrix))


def reference_sparsegpt(
    weight: Tensor, hessian: Tensor, choose: Callable[[Tensor, int], Tensor], width: int
) -> tuple[Tensor, Tensor]:
    """SparseGPT with the inverse of what is left of the Hessian taken anew at every column.

    `choose` gets scores (out, width) and their first column and returns what is kept.
    """
    w = weight.double().clone()
    mask = torch.ones_like(w, dtype=torch.bool)
    columns = w.shape[1]
    inverse = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    for j in range(columns):
        if j % width == 0:
            ahead = range(j, min(j + width, columns))
            scores = torch.stack([w[:, k] ** 2 / inverse[k][0, 0] for k in ahead], dim=1)
            mask[:, j : j + width] = choose(scores, j)
        for row in range(len(w)):
            if not mask[row, j]:
                w[row, j:] -= w[row, j] / inverse[j][0, 0] * inverse[j][0]
                w[row, j] = 0.0
    return w, mask


def reference_least_squares(
    weight: Tensor, mask: Tensor, hessian: Tensor, outputs: Tensor | None = None
) -> Tensor:
    """Solve for the kept weights at once, by the normal equations of the whole layer."""
    rows = weight.shape[0]
    metric = torch.kron(torch.eye(rows).double() if outputs is None else outputs, hessian)
    kept = mask.flatten()
    goal = (metric @ weight.double().flatten())[kept]
    solution = torch.zeros(weight.numel(), dtype=torch.float64)
    solution[kept] = torch.linalg.solve(metric[kept][:, kept], goal)
    return solution.reshape(weight.shape)


def reference_alps_mask(
    weight: Tensor, hessian: Tensor, outputs: Tensor | None, choose: Callable[[Tensor], Tensor]
) -> Tensor:
    """ALPS's ADMM on the layer as one vector, over-relaxed by 1.3, each step a dense solve.

    Eighteen steps; the penalty grows from 0.2 to 0.8, by the same factor each time.
    """
    rows = weight.shape[0]
    metric = torch.kron(torch.eye(rows).double() if outputs is None else outputs, hessian)
    scale = metric.diagonal().sqrt()
    metric = metric / scale / scale[:, None]
    dense = weight.double().flatten() * scale
    rho, growth = 0.2, 4 ** (1 / 17)
    d = dense * choose(dense.abs().reshape(weight.shape)).flatten()
    v = rho * (dense - d)
    for _ in range(18):
        system = metric + rho * torch.eye(len(dense))
        w = torch.linalg.solve(system, metric @ dense - v + rho * d)
        relaxed = 1.3 * w + (1 - 1.3) * d
        z = relaxed + v / rho
        mask = choose(z.abs().reshape(weight.shape)).flatten()
        d = z * mask
        v = v + rho * (relaxed - d)
        rho *= growth
    return mask.reshape(weight.shape)


def reference_cost(change: Tensor, hessian: Tensor, outputs: Tensor | None = None) -> float:
    """Give tr(S · change · H · changeᵀ), S the identity unless given."""
    moved = change.double() @ hessian @ change.double().T
    return float(moved.trace() if outputs is None else (outputs @ moved).trace())
