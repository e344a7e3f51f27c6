"""Recipes: options that go well together, by one name for both stages."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What its name stands for where no other option is given."""

    method: str
    curvature: str
    allocation: str
    statistics: tuple[str, ...]  # that these read, and Wanda


RECIPES = {
    "best": Recipe(  # found by benchmarks/quality.py: docs/benchmarks.md
        method="alps",
        curvature="kfac",
        allocation="sensitivity",
        statistics=("grad_l2", "act_l2", "hessian", "grad_cov"),
    )
}
