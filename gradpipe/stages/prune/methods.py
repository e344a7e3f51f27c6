"""METHODS: all that a method is, an entry each; and what becomes of the weights that it keeps.

A method is a formula, which scores weights, or a solver, which picks weights and updates the rest.
Nothing else in the package knows a method by its name: whoever must tell methods apart reads the
entry. A new one is an entry here, or added to METHODS from outside; a solver is a class as well
(`gradpipe.stages.prune.solver`). Without torch: options are checked against the table before it is
loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradpipe.errors import InputError, did_you_mean
from gradpipe.stages.prune.formula import Expression
from gradpipe.stages.prune.target import Group
from gradpipe.store.statistics import STATISTICS

if TYPE_CHECKING:
    from gradpipe.stages.prune.solver import LayerProblem, MakeUpdate, Solver

GRAD_NORMS = tuple(x.grad_norm for x in STATISTICS.values() if x.grad_norm)

CURVATURES = {  # what solving minimises -> the second moments that it reads; the first: default
    "input": ("hessian",),
    "kfac": ("hessian", "grad_cov"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How weights are picked: by a formula, or by a solver."""

    formula: str | None = None  # as `gradpipe.stages.prune.formula` reads it
    solver: Callable[[LayerProblem], Solver] | None = None  # a class, or what imports it
    reads: tuple[str, ...] = ()  # of the store, by a solver, beside its curvature's moments
    curvatures: tuple[str, ...] = ()  # that a solver can minimise; none: it reads no moments
    group: str = "output"  # the weights compared, unless the user says otherwise
    compares: str | None = None  # in words, by a solver whose grouping is its own: no --group
    whole_counts: bool = False  # counts are of single weights, whatever the group
    decomposes: bool = False  # its second moments, into eigenvectors: expensive where wide

    def __post_init__(self) -> None:
        """Refuse an entry that says nothing, or two things, of how to pick: no name falls through.

        Raises ValueError: it is a mistake in a program, and not of its user.
        """
        if (self.formula is None) == (self.solver is None):
            raise ValueError("a method has a formula or a solver, and not both")
        if self.formula is not None and (self.reads or self.curvatures):
            raise ValueError("a formula reads what its letters say, and no second moments")


def _imported(module: str, name: str) -> Callable[[LayerProblem], Any]:
    """A class or function of this package, imported when it is first called: it needs torch."""

    def make(problem: LayerProblem) -> Any:
        return getattr(import_module(f"{__package__}.{module}"), name)(problem)

    return make


METHODS = {
    "magnitude": Method(formula="abs(W)"),  # Han et al., 2015
    "wanda": Method(formula="abs(W)*X"),  # Sun et al., 2023
    "gradient": Method(formula="abs(W)*G"),  # Das et al., 2023, the gradient term alone
    "gblm": Method(formula="abs(W)*(a*G+X)"),  # GBLM-Pruner: Das et al., 2023
    "fisher": Method(formula="W**2*G2**2"),  # the diagonal of the empirical Fisher information
    "ria": Method(formula="ri(W)*sqrt(X)"),  # Zhang et al., 2024
    "gradient-ria": Method(formula="ri(W)*sqrt(a*G+X)"),  # RIA by GBLM's norm, not the activation's
    "sparsegpt": Method(  # Frantar & Alistarh, 2023
        solver=_imported("sparsegpt", "SparseGpt"),
        curvatures=("input",),
        group="layer",
        compares="128 columns",
        whole_counts=True,
    ),
    "alps": Method(  # Meng et al., 2024
        solver=_imported("alps", "Alps"),
        curvatures=("input", "kfac"),
        group="layer",
        decomposes=True,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What becomes of the weights that a formula keeps."""

    make: MakeUpdate | None = None  # None: they stay as they are
    curvatures: tuple[str, ...] = ()  # that it can minimise


UPDATES = {
    "none": Update(),
    "obs": Update(make=_imported("sparsegpt", "obs_updater"), curvatures=("input",)),
    "lsq": Update(
        make=_imported("least_squares", "least_squares_updater"), curvatures=("input", "kfac")
    ),
}


@dataclass(frozen=True, slots=True)
class Score:
    """A formula with its choices made."""

    expression: Expression
    grad_norm: str
    alpha: float

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the statistics that it reads from the store."""
        return self.expression.statistics(self.grad_norm)


def find_score(name_or_formula: str, grad_norm: str, alpha: float) -> Score:
    """A method's score, or the one that a formula gives; InputError for neither."""
    method = METHODS.get(name_or_formula)
    formula = name_or_formula if method is None else method.formula
    if formula is None:
        raise InputError(f"method {name_or_formula} has no score of its own: give a formula")
    try:
        return Score(Expression.parse(formula), grad_norm, alpha)
    except InputError as error:
        raise InputError(f"{error}{did_you_mean(formula, METHODS)}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenMethod:
    """A method with its choices made: how every layer of a run is pruned."""

    method: Method
    score: Score | None  # None for a solver
    update: Update
    curvature: str
    group: Group

    @property
    def second_moments(self) -> tuple[str, ...]:
        """Those of the curvature, if anything minimises it."""
        is_used = self.method.curvatures or self.update.curvatures
        return CURVATURES[self.curvature] if is_used else ()

    @property
    def statistics(self) -> tuple[str, ...]:
        """What is read of each layer."""
        names = () if self.score is None else self.score.statistics
        return (*names, *self.method.reads, *self.second_moments)

    def by_magnitude(self) -> ChosenMethod:
        """The same for layers without statistics: no calibration token reached them."""
        return replace(
            self,
            method=METHODS["magnitude"],
            score=find_score("magnitude", GRAD_NORMS[0], alpha=0.0),
            update=UPDATES["none"],
        )
