"""What stage two is asked to do: options, checked alone and against each other.

An option that would be ignored is refused, even if it is given as its default.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from gradpipe.errors import InputError, did_you_mean
from gradpipe.options import (
    Option,
    check_options,
    fields_of,
    is_given,
    number,
    refuse_given,
    spelled,
    unasked,
)
from gradpipe.pipeline.options import (
    Device,
    Exclude,
    Include,
    Model,
    Overwrite,
    RankTimeout,
    RecipeName,
    ShardOption,
)
from gradpipe.pipeline.recipes import RECIPES
from gradpipe.stages.prune.allocation import ALLOCATIONS, OWL_FORM, find_rule
from gradpipe.stages.prune.methods import (
    CURVATURES,
    GRAD_NORMS,
    METHODS,
    UPDATES,
    Score,
    find_score,
)
from gradpipe.stages.prune.target import Group, parse_targets


def _sparsity(text: str) -> float:
    one = "one number in [0, 1), the share to prune, as 0.5; repeat --sparsity for several"
    return number(text, "--sparsity", one)


def _alpha(text: str) -> float:
    if text == "auto":
        raise InputError(
            "--alpha auto: prune never runs the model, and cannot compare: let pipe sweep MODEL "
            "STORE OUT --alpha auto choose, and give the number that it finds"
        )
    return number(text, "--alpha", "a finite number, 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneConfig:
    """What to prune, by which store, how, and where to."""

    model: Model
    store: Annotated[
        str, Option(help="Store: a path or a URL.", is_argument=True, is_recorded=False)
    ]
    out: Annotated[
        Path,
        Option(
            help="Folder to create; one in it for each of several.",
            is_argument=True,
            is_recorded=False,
        ),
    ]
    sparsities: Annotated[
        tuple[float, ...],
        Option(
            flag="sparsity",
            help="Share to prune, repeatable.",
            default="0.5, or of an allocation file its mean",
            accepts=lambda sparsity: 0 <= sparsity < 1,
            expected="a number in [0, 1), the share to prune",
            parse=_sparsity,
            metavar="FLOAT",
            is_recorded=False,  # but each target in its own report, as are patterns
        ),
    ] = ()
    patterns: Annotated[
        tuple[str, ...],
        Option(
            flag="pattern",
            help="n kept of every m inputs, repeatable.",
            metavar="N:M",
            is_recorded=False,
        ),
    ] = ()
    recipe: RecipeName = None
    method: Annotated[str, Option(help="{choices}.", choices=METHODS)] = unasked("gblm")
    score: Annotated[
        str | None, Option(help="A formula in the method's place: abs(W)*(a*G1+X).")
    ] = None
    alpha: Annotated[
        float,
        Option(
            help="`a` in formulas: the gradient's weight.",
            accepts=lambda alpha: 0 <= alpha < float("inf"),
            expected="a finite number, 0 or more",
            parse=_alpha,
            metavar="FLOAT",
        ),
    ] = unasked(100.0)  # what the reference code multiplies gradients by
    grad_norm: Annotated[str, Option(help="`G` in formulas: {choices}.", choices=GRAD_NORMS)] = (
        unasked(GRAD_NORMS[0])
    )
    update: Annotated[str, Option(help="Of kept weights: {choices}.", choices=UPDATES)] = unasked(
        "none"
    )
    curvature: Annotated[
        str, Option(help="What lsq, alps minimise: {choices}.", choices=CURVATURES)
    ] = unasked(next(iter(CURVATURES)))
    allocation: Annotated[
        str, Option(help=f"{', '.join(ALLOCATIONS)}, {OWL_FORM}, a JSON file.", is_path=True)
    ] = unasked("uniform")
    allocation_score: Annotated[
        str | None, Option(help="Method or formula that the allocation looks at.")
    ] = None
    mixed_patterns: Annotated[bool, Option(help="Let the allocation choose n for each block.")] = (
        False
    )
    group: Annotated[
        str | None,
        Option(
            help="Weights compared: output, input, layer, global, output:K, input:K.",
            default="output; alps: layer",
        ),
    ] = None
    include: Include = ()
    exclude: Exclude = ()
    device: Device = "auto"
    workers: Annotated[
        int | None,
        Option(
            help="Layers pruned side by side; memory grows with it.",
            least=1,
            default="one a core, at most 8; on a GPU 2",
            is_recorded=False,
        ),
    ] = None
    cache: Annotated[
        Path | None,
        Option(help="Keep what is read of a store far away here.", is_recorded=False),
    ] = None
    shard: ShardOption = None
    allow_mismatch: Annotated[bool, Option(help="Prune weights that were not measured.")] = False
    rank_timeout: RankTimeout = 1800
    overwrite: Overwrite = False

    def __post_init__(self) -> None:
        check_options(self)
        self._resolve()
        self._check_targets()
        self._check_group()
        self._check_method()
        self._check_curvature()
        self._check_allocation()
        self._check_norms()

    def _resolve(self) -> None:
        """Let a recipe, or the method, give what nobody asked for.

        What of a recipe makes no sense beside the options given goes: its method beside a score, an
        update or one threshold for all layers, its allocation beside the last or where patterns
        leave it no choice, its curvature where nothing uses one.
        """
        chosen = {x: fields_of(self)[x].default for x in ("method", "curvature", "allocation")}
        if self.recipe is not None:
            recipe = RECIPES[self.recipe]
            if not (self._is_global or is_given(self, "score") or is_given(self, "update")):
                chosen["method"] = recipe.method
            if not (self._is_global or self._is_all_patterns):
                chosen["allocation"] = recipe.allocation
        self._choose("method", chosen["method"])
        self._choose("allocation", chosen["allocation"])
        used = self._curvatures()
        if self.recipe is not None and recipe.curvature in used:
            chosen["curvature"] = recipe.curvature
        elif used and chosen["curvature"] not in used:
            chosen["curvature"] = used[0]
        self._choose("curvature", chosen["curvature"])
        if self.recipe is not None and not any(
            getattr(self, name) == getattr(recipe, name) and not is_given(self, name)
            for name in chosen
        ):
            raise InputError(
                f"{spelled(self, 'recipe')}: the other options leave nothing of it: leave it out"
            )

    def _choose(self, name: str, value: str) -> None:
        """What a field holds if it was not given."""
        if not is_given(self, name):
            object.__setattr__(self, name, unasked(value))

    def _check_targets(self) -> None:
        labels = [target.label for target in parse_targets(self.sparsities, self.patterns)]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise InputError(
                f"--sparsity or --pattern: {twice[0]} is given twice, expected different targets: "
                "leave one out"
            )

    def _check_group(self) -> None:
        if self.group is None:
            return
        if not self._is_global:
            Group.parse(self.group)
        if self._is_all_patterns or (self.patterns and self.group != "output"):
            refuse_given(self, ("group",), "an n:m pattern compares within its m inputs")
        if (own := METHODS[self.method].compares) is not None:
            refuse_given(self, ("group",), f"{self.method} compares within {own}")
        if self._is_global and (is_given(self, "allocation") or self.own_score is None):
            raise InputError(
                "--group global: scores alone decide how much of a layer goes: "
                "leave --allocation out, and choose a method with a score"
            )

    def _check_method(self) -> None:
        if self.own_score is None:
            refuse_given(self, ("update",), f"{self.method} updates weights by itself")
            if self.score is not None:
                raise InputError(
                    f"--score: {self.method} has no score; leave out the one or the other"
                )
        if self.score is not None and is_given(self, "method"):
            raise InputError(
                f"--score takes the method's place: leave out {spelled(self, 'method')}"
            )

    def _check_curvature(self) -> None:
        """One that is not minimised, or without which nothing else would be, is no choice."""
        used = self._curvatures()
        if len(used) < 2 or self.curvature not in used:  # the method's, or its update's
            users = [f"--update {x}" for x in UPDATES if len(UPDATES[x].curvatures) > 1]
            users += [x for x in METHODS if len(METHODS[x].curvatures) > 1]
            refuse_given(self, ("curvature",), f"only {' and '.join(users)} use it")

    def _check_allocation(self) -> None:
        if find_rule(self.allocation) is None and not Path(self.allocation).is_file():
            hint = did_you_mean(self.allocation, ALLOCATIONS)
            if self.allocation == "global":
                hint = ": for one threshold, --group global"
            raise InputError(
                f"--allocation {self.allocation}: expected one of {', '.join(ALLOCATIONS)}, "
                f"{OWL_FORM} or a JSON file of sparsities by layer name{hint}"
            )
        if self.allocation_score is not None:
            rule = find_rule(self.allocation)
            if rule is None or not rule.num_passes:
                refuse_given(
                    self, ("allocation_score",), f"--allocation {self.allocation} uses none"
                )
            find_score(self.allocation_score, self.grad_norm, self.alpha)
        if self.mixed_patterns and (self.allocation == "uniform" or not self.patterns):
            raise InputError("--mixed-patterns: it needs a --pattern and an --allocation")
        if self._is_all_patterns:
            why = "n:m is the same in every block, unless --mixed-patterns lets it choose"
            refuse_given(self, ("allocation",), why)

    def _check_norms(self) -> None:
        """`--alpha` and `--grad-norm` are parts of a formula."""
        scores = (self.own_score, self.score_of_allocation)
        names = {name for score in scores if score is not None for name in score.expression.names}
        what = self.score or self.method
        if "a" not in names:
            refuse_given(self, ("alpha",), f"{what} has none")
        if "G" not in names:
            refuse_given(self, ("grad_norm",), f"{what} does not use it")

    @property
    def _is_global(self) -> bool:
        return self.group == "global"

    @property
    def _is_all_patterns(self) -> bool:
        """True if each target is one n:m for all blocks: no share is to be allocated."""
        return bool(self.patterns) and not self.sparsities and not self.mixed_patterns

    def _curvatures(self) -> tuple[str, ...]:
        """What the method, or else its update, can minimise."""
        return METHODS[self.method].curvatures or UPDATES[self.update].curvatures

    @property
    def own_score(self) -> Score | None:
        """The formula's, or the method's; None for a solver."""
        if METHODS[self.method].formula is None:
            return None
        return find_score(self.score or self.method, self.grad_norm, self.alpha)

    @property
    def score_of_allocation(self) -> Score | None:
        """What the allocation looks at, if that is not the method's own score."""
        rule = find_rule(self.allocation)
        name = self.allocation_score or (rule.score if rule is not None else None)
        return None if name is None else find_score(name, self.grad_norm, self.alpha)
