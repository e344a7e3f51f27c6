"""The kept weights of least cost for a given mask, by conjugate gradients."""

import torch
from torch import Tensor

from gradpipe.stages.prune.curvature import Curvature
from gradpipe.stages.prune.solver import LayerProblem, UpdateKept

_STEPS = 30
_TOLERANCE = 1e-6  # of the squared residual: what is left to gain is lost in rounding


def least_squares_updater(problem: LayerProblem) -> UpdateKept:
    """The update of any mask."""
    weight_OI, curvature = problem.weight, problem.curvature
    return lambda mask_OI: least_squares(weight_OI, mask_OI, curvature)


def least_squares(
    weight_OI: Tensor,
    mask_OI: Tensor,
    curvature: Curvature,
    start_OI: Tensor | None = None,
    least_gain: float = 0.0,
) -> Tensor:
    """The weights on `mask_OI` of least cost, (O, I), in the weight's dtype.

    From `start_OI` on, in the curvature's dtype, or from the weights themselves, to a step that
    gains less than a share `least_gain` of the cost. The cost never rises above that of just
    setting the others to zero, in the weight's dtype: where rounding costs more than there was to
    gain, nothing is moved.
    """
    masked_OI = weight_OI * mask_OI
    dense_OI = weight_OI.to(curvature.hessian.dtype)
    current_OI = (dense_OI if start_OI is None else start_OI) * mask_OI
    rounded_OI = _minimum(dense_OI, mask_OI, curvature, current_OI, least_gain)
    rounded_OI = rounded_OI.to(weight_OI.dtype)
    rises = _cost(weight_OI, rounded_OI, curvature) > _cost(weight_OI, masked_OI, curvature)
    return torch.where(rises, masked_OI, rounded_OI)


def _cost(weight_OI: Tensor, pruned_OI: Tensor, curvature: Curvature) -> Tensor:
    """What the change costs: each row, or all."""
    dtype = curvature.hessian.dtype
    change_OI = weight_OI.to(dtype) - pruned_OI.to(dtype)
    return _dot(change_OI, curvature.times(change_OI), curvature)


def _minimum(
    weight_OI: Tensor,
    mask_OI: Tensor,
    curvature: Curvature,
    current_OI: Tensor,
    least_gain: float,
) -> Tensor:
    """Conjugate gradients, from `current_OI` on, in place."""
    preconditioner = curvature.diagonal().reciprocal()
    change_OI = weight_OI - current_OI
    residual_OI = curvature.times(change_OI)
    cost = _dot(change_OI, residual_OI, curvature)
    residual_OI *= mask_OI
    step_OI = preconditioner * residual_OI
    direction_OI = step_OI.clone()
    product = _dot(residual_OI, step_OI, curvature)
    goal = _TOLERANCE * product
    for _ in range(_STEPS):
        if bool((product <= goal).all()):
            break
        curved_OI = curvature.times(direction_OI).mul_(mask_OI)
        length = _ratio(product, _dot(direction_OI, curved_OI, curvature))
        current_OI += length * direction_OI
        gain = length * product
        cost -= gain
        if bool(gain.sum() < least_gain * cost.sum()):
            break
        residual_OI -= length * curved_OI
        step_OI = preconditioner * residual_OI
        before, product = product, _dot(residual_OI, step_OI, curvature)
        direction_OI = step_OI + _ratio(product, before) * direction_OI
    return current_OI


def _dot(a_OI: Tensor, b_OI: Tensor, curvature: Curvature) -> Tensor:
    """Of each row, (O, 1), where rows are problems of their own; else of all, (1, 1)."""
    product_OI = a_OI * b_OI
    if curvature.cov is None:
        return product_OI.sum(dim=1, keepdim=True)
    return product_OI.sum()[None, None]


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """The quotient, or 0 where a row has nothing left to gain."""
    return torch.where(b > 0, a / b.clamp_min(torch.finfo(b.dtype).tiny), 0.0)
