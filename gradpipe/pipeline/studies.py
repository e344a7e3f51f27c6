"""STUDIES: the grids of published tables and figures, an entry each; data alone.

Sources: GBLM-Pruner (Das, Sun, Ma, Shen; arXiv 2311.04902v2), tables and figures by its numbers;
OWL (Yin et al.; arXiv 2310.05175) and DLP (Chen et al., 2025). ℓ1 is over samples, α is 100, and
sparsity is 50 % wherever a paper does not vary it. What a paper does not give in numbers is named
in `reconstructed`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Axes = Mapping[str, Any]  # field of SweepConfig -> values


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A grid under a name."""

    title: str
    grids: tuple[Axes, ...]  # one after the other; a point that is in two is one
    x: str = "target"  # what columns and a picture's horizontal axis are: a point's field
    statistics: tuple[str, ...]  # that a store must hold
    reconstructed: str = ""  # which rows or values are ours
    needs_stores: bool = False  # of several numbers of samples


_HALF = (0.5,)
_TENTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_GBLM: Axes = {"methods": ("gblm",), "grad_norms": ("l1",)}
_BY_LAYER: Axes = {"methods": ("magnitude",), "groups": ("layer",)}  # the papers' magnitude
_MASKS = ("sparsegpt", "wanda", "gblm")
_TERMS = ("abs(W)*abs({G})", "abs(W)*X*abs({G})")  # the gradient alone, and times the activation
_SUMS = (  # of an activation term and a gradient term; `{s}` is its sign
    "abs(W)*X{s}a*abs(W)*abs({G})",
    "(abs(W)*X)**2{s}a*abs(W)*abs({G})",
    "(abs(W)*X)**2{s}a*W*{G}",
)


def _formulas(templates: tuple[str, ...], signs: str = "+") -> tuple[str, ...]:
    """Each template for each sign and each sum of gradients; norms are never negative."""
    return tuple(
        template.replace("{s}", sign).replace("abs({G})", size).replace("{G}", letter)
        for template in templates
        for sign in (signs if "{s}" in template else signs[0])
        for letter, size in (("GS", "abs(GS)"), ("G1", "G1"), ("G2", "G2"))
    )


STUDIES = {
    "groups": Study(
        title="GBLM-Pruner, Table 1: what is compared",
        grids=(
            {
                **_GBLM,
                "groups": ("layer", "input", "input:128", "output", "output:128"),
                "sparsities": _HALF,
            },
        ),
        statistics=("grad_l1", "act_l2"),
    ),
    "main": Study(
        title="GBLM-Pruner, Table 2: methods at 50 %, 2:4 and 4:8",
        grids=(
            {**_BY_LAYER, "sparsities": _HALF},
            {"methods": ("magnitude",), "patterns": ("2:4", "4:8")},
            {
                "methods": _MASKS,
                "grad_norms": ("l1", "l2"),
                "sparsities": _HALF,
                "patterns": ("2:4", "4:8"),
            },
        ),
        statistics=("grad_l1", "grad_l2", "act_l2", "hessian"),
        reconstructed="ℓ2 is in Table 8 (chat models) alone",
    ),
    "gradient": Study(
        title="GBLM-Pruner, Tables 4 and 5: the gradient alone, with and without its sign",
        grids=(
            {"scores": _formulas(_TERMS[:1]), "sparsities": _HALF},
            {"scores": ("abs(W)*X+a*abs(W)*abs(GS)",), "sparsities": _HALF},
            {"methods": ("wanda", "gblm"), "grad_norms": ("l1", "l2"), "sparsities": _HALF},
        ),
        statistics=("grad_l1", "grad_l2", "grad_sum", "act_l2"),
        reconstructed="Wanda's row is Table 2's",
    ),
    "alpha": Study(
        title="GBLM-Pruner, Table 6: the gradient's weight",
        grids=(
            {
                **_GBLM,
                "alphas": (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0, 100000.0),
                "sparsities": _HALF,
            },
        ),
        x="alpha",
        statistics=("grad_l1", "act_l2"),
    ),
    "metrics": Study(
        title="GBLM-Pruner, Table 10: sums and products of weight, activation and gradient",
        grids=({"scores": (*_formulas(_TERMS), *_formulas(_SUMS, "+-")), "sparsities": _HALF},),
        statistics=("grad_l1", "grad_l2", "grad_sum", "act_l2"),
        reconstructed="the norms' exponents of the last row are doubtful in print: none is taken",
    ),
    "obs": Study(
        title="GBLM-Pruner, Table 9: masks with and without the update of Optimal Brain Surgeon",
        grids=(
            {**_BY_LAYER, "updates": ("none", "obs"), "sparsities": _HALF},
            {"methods": ("wanda", "gblm"), "updates": ("none", "obs"), "sparsities": _HALF},
        ),
        x="update",
        statistics=("grad_l1", "act_l2", "hessian"),
    ),
    "sparsity": Study(
        title="GBLM-Pruner, Figure 2: perplexity against sparsity",
        grids=(
            {**_BY_LAYER, "sparsities": _TENTHS},
            {"methods": _MASKS, "sparsities": _TENTHS},
        ),
        statistics=("grad_l1", "act_l2", "hessian"),
        reconstructed="the sparsities: the figure gives none in numbers",
    ),
    "samples": Study(
        title="GBLM-Pruner, Figure 3: perplexity against the number of calibration samples",
        grids=({"methods": _MASKS, "sparsities": _HALF},),
        x="samples",
        statistics=("grad_l1", "act_l2", "hessian"),
        reconstructed="the numbers of samples are those of the stores; the figure has 1 to 512",
        needs_stores=True,
    ),
    "vit": Study(
        title="GBLM-Pruner, Table 7: an image classifier's top-1 accuracy",
        grids=(
            {
                "methods": ("wanda", "magnitude", "gblm"),
                "grad_norms": ("l1", "l2"),
                "sparsities": (0.0, 0.5, 0.6, 0.7, 0.8),
            },
        ),
        statistics=("grad_l1", "grad_l2", "act_l2"),
    ),
    "owl": Study(
        title="OWL and DLP at 70 %: blocks by their outliers, or by their medians",
        grids=(
            {
                "methods": _MASKS,
                "allocations": ("uniform", "owl", "dlp"),
                "sparsities": (0.7,),
            },
            {
                "methods": ("wanda",),
                "allocations": tuple(
                    f"owl:{spread},{times}"
                    for spread in (0.02, 0.05, 0.08, 0.1, 0.2)
                    for times in (3, 5, 7, 10)
                ),
                "sparsities": (0.7,),
            },
        ),
        statistics=("grad_l1", "act_l2", "hessian"),
        reconstructed="GBLM's rows, which neither paper has; which λ and M are tried",
    ),
}
