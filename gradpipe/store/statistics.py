"""The statistics that a store can hold."""

from __future__ import annotations

from collections.abc import Iterable

GRADIENT_STATISTICS = ("grad_l1", "grad_l2", "grad_sum")  # (out, in)

ACTIVATION_STATISTICS = ("act_l2", "act_sum")  # (in,)

SECOND_MOMENTS = ("hessian", "grad_cov")  # (in, in) and (out, out), as packed triangles

DEFAULT_STATISTICS = ("grad_l1", "grad_l2", "act_l2")

STATISTICS = GRADIENT_STATISTICS + ACTIVATION_STATISTICS + SECOND_MOMENTS


def needs_backward(statistics: Iterable[str]) -> bool:
    """True if any of them is of gradients."""
    return not {*GRADIENT_STATISTICS, "grad_cov"}.isdisjoint(statistics)
