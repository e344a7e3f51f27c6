"""What stage two is asked to do: options, checked against each other, as the stages want them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradpipe.errors import InputError
from gradpipe.pipeline.options import check_regexes
from gradpipe.stages.prune.allocation import ALLOCATIONS
from gradpipe.stages.prune.methods import (
    CURVATURES,
    GRAD_NORMS,
    METHODS,
    UPDATES,
    Score,
    find_score,
)
from gradpipe.stages.prune.target import Group, parse_targets
from gradpipe.store.shard import Shard

Options = dict[str, Any]  # fields of a `PruneConfig`

RECIPES: dict[str, Options] = {  # found by benchmarks/quality.py: docs/benchmarks.md
    "best": {"method": "alps", "curvature": "kfac", "allocation": "sensitivity"},
}

RECIPE_STATISTICS = ("grad_l2", "act_l2", "hessian", "grad_cov")  # what a recipe reads, and Wanda

_DEFAULT_METHOD = "gblm"

_DEFAULT_ALPHA = 100.0  # what the reference code multiplies gradients by


def recipe_options(name: str | None, chosen: Options) -> Options:
    """The options behind a recipe's name, those `chosen` in their place; InputError for no such.

    What of the recipe makes no sense beside them goes: its method beside a score, an update or one
    threshold for all layers, its allocation beside the last, its curvature where nothing uses one.
    """
    if name is None:
        return chosen
    if name not in RECIPES:
        raise InputError(f"--recipe {name}: expected {', '.join(RECIPES)}")
    recipe = dict(RECIPES[name])
    is_global = chosen.get("group") == "global"
    if is_global:
        del recipe["allocation"]
    if is_global or not chosen.keys().isdisjoint({"score", "update"}):
        del recipe["method"]
    options = recipe | chosen
    method, update = options.get("method", _DEFAULT_METHOD), options.get("update", "none")
    if recipe["curvature"] not in _curvatures(method, update):
        del recipe["curvature"]
    return recipe | chosen


def _curvatures(method: str, update: str) -> tuple[str, ...]:
    """What may be minimised; nothing for names that are not known."""
    entries = (METHODS.get(method), UPDATES.get(update))
    return tuple(name for entry in entries if entry is not None for name in entry.curvatures)


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneConfig:
    """What to prune, by which store, how, and where to."""

    model: str  # directory, Hub id, or `embedded`
    store: str  # path or URL
    out: Path  # a folder to create; with several targets, one folder in it for each
    sparsities: tuple[float, ...] = ()  # default: 0.5, or what a file of an allocation comes to
    patterns: tuple[str, ...] = ()  # n:m, n kept of every m
    method: str = _DEFAULT_METHOD
    alpha: float = _DEFAULT_ALPHA
    grad_norm: str = GRAD_NORMS[0]
    score: str | None = None  # a formula, in place of the method's
    update: str = "none"  # what becomes of the weights that stay: none, obs or lsq
    curvature: str = "input"  # what alps and lsq minimise: input, or kfac, which needs grad_cov
    allocation: str = "uniform"  # owl, dlp, sensitivity, or a JSON file
    allocation_score: str | None = None  # a method or formula for the allocation to look at
    mixed_patterns: bool = False  # let the allocation choose n of n:m for each block
    group: str | None = None  # default: the method's
    include: tuple[str, ...] = ()  # regexes on layer names; default: every layer in the blocks
    exclude: tuple[str, ...] = ()
    device: str = "auto"
    shard: Shard | None = None  # one of several jobs, each with a share of the checkpoint's files
    allow_mismatch: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for flag, value, known in (
            ("method", self.method, METHODS),
            ("grad-norm", self.grad_norm, GRAD_NORMS),
            ("update", self.update, UPDATES),
            ("curvature", self.curvature, CURVATURES),
        ):
            if value not in known:
                raise InputError(f"--{flag} {value}: expected one of {', '.join(known)}")
        if not 0 <= self.alpha < float("inf"):
            raise InputError(f"--alpha {self.alpha}: expected a finite number, 0 or more")
        for sparsity in self.sparsities:
            if not 0 <= sparsity < 1:
                raise InputError(
                    f"--sparsity {sparsity}: expected a number in [0, 1), the share to prune"
                )
        self._check_group()
        self._check_combination()
        labels = [target.label for target in parse_targets(self.sparsities, self.patterns)]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise InputError(
                f"--sparsity or --pattern: {twice[0]} is given twice, expected different targets: "
                "leave one out"
            )
        check_regexes("--include", self.include)
        check_regexes("--exclude", self.exclude)

    def _check_group(self) -> None:
        if self.group is None:
            return
        if self.group != "global":
            Group.parse(self.group)
        if self.patterns and self.group != "output":
            raise InputError(
                f"--group {self.group}: an n:m pattern compares within its m inputs; leave it out"
            )
        if (own := METHODS[self.method].compares) is not None:
            raise InputError(
                f"--group {self.group}: {self.method} compares within {own}; leave it out"
            )
        if self.group == "global" and (self.allocation != "uniform" or not self._has_score):
            raise InputError(
                "--group global: scores alone decide how much of a layer goes: "
                "leave --allocation out, and choose a method with a score"
            )

    def _check_combination(self) -> None:
        """Refuse options that would be ignored."""
        if self._has_score:
            self._score()
        elif self.update != "none":
            raise InputError(f"--update {self.update}: {self.method} updates weights by itself")
        elif self.score is not None:
            raise InputError(f"--score: {self.method} has no score; leave out the one or the other")
        if self.score is not None and self.method != _DEFAULT_METHOD:
            raise InputError(f"--score takes the method's place: leave out --method {self.method}")
        self._check_curvature()
        if self.allocation not in ALLOCATIONS and not Path(self.allocation).is_file():
            hint = ": for one threshold, --group global" if self.allocation == "global" else ""
            raise InputError(
                f"--allocation {self.allocation}: expected one of {', '.join(ALLOCATIONS)} or a "
                f"JSON file of sparsities by layer name{hint}"
            )
        if self.allocation_score is not None:
            if self.allocation not in ALLOCATIONS or not ALLOCATIONS[self.allocation].num_passes:
                raise InputError(f"--allocation-score: --allocation {self.allocation} uses none")
            find_score(self.allocation_score, self.grad_norm, self.alpha)
        if self.mixed_patterns and (self.allocation == "uniform" or not self.patterns):
            raise InputError("--mixed-patterns: it needs a --pattern and an --allocation")
        self._check_norms()

    def _check_curvature(self) -> None:
        """One that nothing minimises would be ignored; the default is no choice."""
        used = _curvatures(self.method, self.update)
        if self.curvature not in (*used, next(iter(CURVATURES))):
            users = [f"--update {x}" for x in UPDATES if self.curvature in UPDATES[x].curvatures]
            users += [x for x in METHODS if self.curvature in METHODS[x].curvatures]
            raise InputError(
                f"--curvature {self.curvature}: only {' and '.join(users)} use it: leave it out"
            )

    def _check_norms(self) -> None:
        """`--alpha` and `--grad-norm` are parts of a formula."""
        scores = [self._score() if self._has_score else None, self._allocation_score()]
        names = {name for score in scores if score is not None for name in score.expression.names}
        what = self.score or self.method
        if self.alpha != _DEFAULT_ALPHA and "a" not in names:
            raise InputError(f"--alpha {self.alpha}: {what} has none: leave it out")
        if self.grad_norm != GRAD_NORMS[0] and "G" not in names:
            raise InputError(f"--grad-norm {self.grad_norm}: {what} does not use it: leave it out")

    @property
    def _has_score(self) -> bool:
        return METHODS[self.method].formula is not None

    def _score(self) -> Score:
        return find_score(self.score or self.method, self.grad_norm, self.alpha)

    def _allocation_score(self) -> Score | None:
        """What the allocation looks at, if that is not the method's own score."""
        rule = ALLOCATIONS.get(self.allocation)
        name = self.allocation_score or (rule.score if rule is not None else None)
        return None if name is None else find_score(name, self.grad_norm, self.alpha)
