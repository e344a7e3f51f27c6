"""ALLOCATIONS: how much of each layer goes, by rules, an entry each.

A rule is a function from what is asked for to a wish: sparsities by layer whose mean, weighted by
size, is the target. It learns of scores by passes over all layers, before anything is written. A
new rule is an entry here, or added to ALLOCATIONS from outside. Without torch: options are checked
against the table before it is loaded.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING

from gradpipe.errors import InputError, did_you_mean
from gradpipe.stages.prune.allocation_rules import (
    OWL_LAMBDA,
    OWL_OUTLIERS,
    SENSITIVITY,
    dlp,
    owl,
    rounded,
    shifted,
    whole_parts,
)
from gradpipe.stages.prune.target import Budget, Group, Pattern, Target
from gradpipe.store.schema import LayerSpec

if TYPE_CHECKING:
    from gradpipe.stages.prune.score_passes import ScorePasses

Layers = Mapping[str, LayerSpec]  # by name
Wish = dict[str, float]  # sparsities by layer name
Budgets = dict[str, Budget]  # by layer name


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationRule:
    """How a sparsity is shared out among layers."""

    wish: Callable[[Layers, Sequence[Target], ScorePasses], list[Wish]] | None  # None: uniform
    num_passes: int = 0  # over the scores of all layers; 0: it looks at none
    score: str | None = None  # the method or formula to look at; None: the run's own


def _owl(
    layers: Layers,
    targets: Sequence[Target],
    scores: ScorePasses,
    *,
    spread: float = OWL_LAMBDA,
    times: float = OWL_OUTLIERS,
) -> list[Wish]:
    shares, sizes = scores.outlier_shares(_blocks(layers), times), _block_sizes(layers)
    return _by_block(layers, [owl(shares, sizes, x, spread) for x in _sparsities(targets)])


def _dlp(layers: Layers, targets: Sequence[Target], scores: ScorePasses) -> list[Wish]:
    medians = scores.medians(_blocks(layers))
    return _by_block(layers, [dlp(medians, _block_sizes(layers), x) for x in _sparsities(targets)])


def _competing(
    layers: Layers, targets: Sequence[Target], scores: ScorePasses, *, part: float
) -> list[Wish]:
    """All weights compete: so far from uniform to what they would come to."""
    sizes = _sizes(layers)
    totals = [int(target.budget.sparsity * sum(sizes.values())) for target in targets]
    counts = scores.counts_of_lowest(totals)
    return [
        {name: part * n / sizes[name] + (1 - part) * sparsity for name, n in of_layer.items()}
        for sparsity, of_layer in zip(_sparsities(targets), counts, strict=True)
    ]


ALLOCATIONS = {
    "uniform": AllocationRule(wish=None),
    "owl": AllocationRule(wish=_owl, score="wanda", num_passes=2),
    "dlp": AllocationRule(wish=_dlp, score="wanda", num_passes=2),
    "sensitivity": AllocationRule(
        wish=partial(_competing, part=SENSITIVITY), score="fisher", num_passes=3
    ),
}

OWL_FORM = "owl:λ,M"  # OWL with numbers of one's own
_OWL = re.compile(r"owl:(0?\.\d+|0|1),(\d+(?:\.\d+)?)")


def find_rule(name: str) -> AllocationRule | None:
    """The rule of a name, with OWL's λ and M if they are in it (`owl:0.08,5`); None if none is."""
    numbers = _OWL.fullmatch(name)
    if numbers is None:
        return ALLOCATIONS.get(name)
    spread, times = map(float, numbers.groups())
    return replace(ALLOCATIONS["owl"], wish=partial(_owl, spread=spread, times=times))


GLOBAL = AllocationRule(wish=partial(_competing, part=1.0), num_passes=3)  # --group global's


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationFile:
    """A JSON file of sparsities by layer name; its `wish` is a rule's."""

    path: str  # as the user gave it, for messages alone
    name: str  # for reports: the file's own name, and the digest of its content
    document: object  # what the file holds

    def sparsities(self, layers: Layers) -> Wish:
        """Sparsities by layer name; InputError if one is none, or left out."""
        document = self.document if isinstance(self.document, dict) else {}
        wish = {}
        for name in layers:
            value = document.get(name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
                raise InputError(
                    f"--allocation {self.path}: expected a number from 0 to 1 for layer {name}, "
                    f"got {str(value)[:40]}"
                )
            wish[name] = float(value)
        return wish

    def check_names(self, layers: Layers) -> None:
        """Raises InputError for a name of none of these layers: its sparsity would be ignored."""
        names = self.document if isinstance(self.document, dict) else {}
        for name in (x for x in names if x not in layers):
            raise InputError(
                f"--allocation {self.path}: {name:.80} is none of the layers that are pruned: take "
                f"it out{did_you_mean(name, layers)}"
            )

    def wish(self, layers: Layers, targets: Sequence[Target], _: ScorePasses) -> list[Wish]:
        """The file's sparsities, moved to each target."""
        wish, sizes = self.sparsities(layers), _sizes(layers)
        return [shifted(wish, sizes, sparsity) for sparsity in _sparsities(targets)]

    def own_target(self, layers: Layers) -> Target:
        """What the file comes to by itself: the sparsities' mean, weighted by the layers' sizes.

        Raises InputError if that leaves no weight, or the file leaves a layer out.
        """
        sparsities, sizes = self.sparsities(layers), _sizes(layers)
        mean = math.fsum(sparsities[name] * sizes[name] for name in sizes) / sum(sizes.values())
        if mean >= 1:
            raise InputError(
                f"--allocation {self.path}: it leaves no weight: expected a mean below 1"
            )
        return Target(mean)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """A rule with its choices made: from targets to a budget for each layer."""

    name: str  # as reports have it
    rule: AllocationRule
    group: Group
    whole_counts: bool  # counts are of single weights, whatever the group
    mixes_patterns: bool  # n of an n:m pattern may differ between blocks

    def keeps_pattern(self, target: Target) -> bool:
        """True for a target whose pattern is every block's, whatever the rule."""
        return target.pattern is not None and not self.mixes_patterns

    def budgets(
        self, layers: Layers, targets: Sequence[Target], scores: ScorePasses
    ) -> list[Budgets]:
        """One budget for each layer, for each target."""
        if self.rule.wish is None or all(map(self.keeps_pattern, targets)):
            return [dict.fromkeys(layers, target.budget) for target in targets]
        wishes = self.rule.wish(layers, targets, scores)
        return [
            dict.fromkeys(layers, target.budget)
            if self.keeps_pattern(target)
            else self._rounded(layers, target, wish)
            for target, wish in zip(targets, wishes, strict=True)
        ]

    def _rounded(self, layers: Layers, target: Target, wish: Wish) -> Budgets:
        """Budgets in whole weights, rows or patterns, beside the wish."""
        if target.pattern is not None:
            return _patterns(layers, target.pattern, wish)
        sizes = _sizes(layers)
        steps = {name: self._step(layer) for name, layer in layers.items()}
        counts = rounded(wish, sizes, steps, int(target.budget.sparsity * sum(sizes.values())))
        return {name: Budget(Fraction(count, sizes[name])) for name, count in counts.items()}

    def _step(self, layer: LayerSpec) -> int:
        """How many weights one more in every group of a layer are."""
        if self.whole_counts or self.group.axis is None:
            return 1
        return max(layer.shape[self.group.axis] // self.group.size, 1)


def _sparsities(targets: Sequence[Target]) -> list[float]:
    return [float(target.budget.sparsity) for target in targets]


def _sizes(layers: Layers) -> dict[str, int]:
    return {name: layer.num_weights for name, layer in layers.items()}


def _blocks(layers: Layers) -> dict[str, str]:
    """What each layer is grouped under; one outside the blocks stands alone."""
    return {
        name: name if layer.block is None else f"block {layer.block}"
        for name, layer in layers.items()
    }


def _block_sizes(layers: Layers) -> dict[str, int]:
    sizes: dict[str, int] = defaultdict(int)
    for name, block in _blocks(layers).items():
        sizes[block] += layers[name].num_weights
    return sizes


def _by_block(layers: Layers, wishes: Sequence[Mapping[str, float]]) -> list[Wish]:
    """Each layer's wish: its block's."""
    return [{name: wish[block] for name, block in _blocks(layers).items()} for wish in wishes]


def _patterns(layers: Layers, pattern: Pattern, wish: Wish) -> Budgets:
    """An n for each block, from 1 to m, whose weighted mean is as near the pattern's as may be."""
    blocks, sizes = _blocks(layers), _block_sizes(layers)
    pruned: dict[str, float] = defaultdict(float)
    for name, layer in layers.items():
        pruned[blocks[name]] += wish[name] * layer.num_weights
    sparsities = {block: pruned[block] / size for block, size in sizes.items()}
    sparsities = shifted(sparsities, sizes, float(pattern.sparsity), 1 - 1 / pattern.m)
    goal = (pattern.m - pattern.n) * sum(sizes.values())
    parts = whole_parts(sparsities, sizes, pattern.m, goal)
    kept = {block: Pattern(pattern.m - count, pattern.m) for block, count in parts.items()}
    return {name: Budget(kept[x].sparsity, kept[x]) for name, x in blocks.items()}
