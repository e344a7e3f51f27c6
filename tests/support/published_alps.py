"""ALPS as it was published, step by step: what our shorter ADMM is held against.

Follows Meng, Behdin, Wang, Mazumder 2024 (arXiv 2406.07831), algorithms 1 and 2; what they leave
open (how often the penalty is looked at, where it starts, when the loop ends) is as in the authors'
code, github.com/mazumder-lab/ALPS. Slow on purpose, in float64, and independent: it imports nothing
of the package under test.

Shapes: a weight is (out, in); a Hessian is (in, in), float64, damped already.
"""

from collections.abc import Callable

import torch
from torch import Tensor

FIRST_PENALTY = 0.1
LOOK_EVERY = 3  # steps
MOST_STEPS = 300
PATIENCE = 30  # steps, after which a support that all but rests is taken
DESCENT_STEPS = 10

Choose = Callable[[Tensor], Tensor]  # scores (out, in) -> what is kept


def published_alps(weight: Tensor, hessian: Tensor, choose: Choose) -> tuple[Tensor, Tensor]:
    """Give the pruned weight and its mask."""
    roots = hessian.diagonal().sqrt()
    metric, dense = hessian / roots / roots[:, None], weight.double() * roots
    mask = published_support(dense, metric, choose)
    return published_descent(dense, metric, mask) / roots, mask.ne(0)


def published_support(dense: Tensor, metric: Tensor, choose: Choose) -> Tensor:
    """Algorithm 1, on a problem scaled to a unit diagonal: W on its largest weights, (out, in)."""
    goal, identity = dense @ metric, torch.eye(len(metric)).double()
    start = dense * choose(dense.abs())
    rho, begun = FIRST_PENALTY, False
    inverse: Tensor = torch.linalg.inv(metric + rho * identity)
    d, v, seen = start, torch.zeros_like(dense), start != 0
    for step in range(1, MOST_STEPS + 1):
        w = (goal - v + rho * d) @ inverse
        d = (w + v / rho) * choose((w + v / rho).abs())
        v = v + rho * (w - d)
        if step % LOOK_EVERY:
            continue
        moved = int(((d != 0) ^ seen).sum())
        share = moved / int(seen.sum())
        seen = d != 0
        if moved == 0 and begun:
            break
        if share > 0.005 or (moved and begun):
            rho *= 1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1
            begun = True
        elif moved:  # hardly any moved at the first looks: begin again, looser
            rho /= 5
            d, v = start, torch.zeros_like(dense)
        else:
            rho /= 5
        inverse = torch.linalg.inv(metric + rho * identity)
        if step > PATIENCE and share < 0.0003:
            break
    return w * choose(w.abs())


def published_descent(dense: Tensor, metric: Tensor, start: Tensor) -> Tensor:
    """Algorithm 2: conjugate gradients on the support of `start`, each row with its own steps.

    Its preconditioner is the diagonal, which is 1 here.
    """
    mask, x = start != 0, start.clone()
    residual = (dense - x) @ metric * mask
    direction = residual.clone()
    for _ in range(DESCENT_STEPS):
        curved = direction @ metric
        size = residual.square().sum(dim=1, keepdim=True)
        length = size / (direction * curved).sum(dim=1, keepdim=True).clamp_min(1e-300)
        x = x + length * direction
        residual = residual - length * curved * mask
        growth = residual.square().sum(dim=1, keepdim=True) / size.clamp_min(1e-300)
        direction = residual + growth * direction
    return x
