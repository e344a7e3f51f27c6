"""How much of each layer goes: passes over weights and statistics before anything is written."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gradpipe.errors import InputError
from gradpipe.stages.prune.allocation_rules import (
    OWL_OUTLIERS,
    SENSITIVITY,
    dlp,
    owl,
    rounded,
    shifted,
    whole_parts,
)
from gradpipe.stages.prune.mask import Group, Pattern
from gradpipe.stages.prune.target import Budget, Target
from gradpipe.stages.prune.thresholds import Ranks
from gradpipe.store.schema import LayerSpec

ALLOCATIONS = ("uniform", "owl", "dlp", "sensitivity")

SCORES = {"owl": "wanda", "dlp": "wanda", "sensitivity": "fisher"}  # what each looks at by default

Scores = Callable[[Iterable[str]], Iterable[tuple[LayerSpec, Tensor]]]  # of these weight keys

Budgets = dict[str, Budget]  # by weight key


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """How a sparsity is shared out."""

    kind: str  # uniform, owl, dlp, sensitivity, global, or a JSON file of sparsities by layer
    group: Group
    is_exact: bool  # counts are of single weights, whatever the group: SparseGPT's
    mixes_patterns: bool  # n of an n:m pattern may differ between blocks

    @property
    def num_passes(self) -> int:
        """How often it goes through the scores of all layers."""
        return 3 if self.kind in {"global", "sensitivity"} else 2

    def budgets(
        self, layers: Mapping[str, LayerSpec], targets: Sequence[Target], scores: Scores
    ) -> list[Budgets]:
        """One budget for each layer, for each target."""
        uniform = [target.pattern is not None and not self.mixes_patterns for target in targets]
        if self.kind == "uniform" or all(uniform):
            return [dict.fromkeys(layers, target.budget) for target in targets]
        wishes = self._wishes(layers, targets, scores)
        return [
            dict.fromkeys(layers, target.budget)
            if is_uniform
            else self._rounded(layers, target, wish)
            for is_uniform, target, wish in zip(uniform, targets, wishes, strict=True)
        ]

    def _wishes(
        self, layers: Mapping[str, LayerSpec], targets: Sequence[Target], scores: Scores
    ) -> list[dict[str, float]]:
        """Sparsities by weight key, whose weighted mean is each target's."""
        sizes = {key: layer.num_weights for key, layer in layers.items()}
        sparsities = [float(target.budget.sparsity) for target in targets]
        if self.kind in {"global", "sensitivity"}:
            share = SENSITIVITY if self.kind == "sensitivity" else 1.0
            return [
                {
                    key: share * count / sizes[key] + (1 - share) * sparsity
                    for key, count in x.items()
                }
                for sparsity, x in zip(sparsities, _global(sizes, targets, scores), strict=True)
            ]
        if self.kind in {"owl", "dlp"}:
            blocks = {key: _block(layer) for key, layer in layers.items()}
            block_sizes: dict[str, int] = defaultdict(int)
            for key, block in blocks.items():
                block_sizes[block] += sizes[key]
            is_owl = self.kind == "owl"
            values = _outliers(layers, scores) if is_owl else _medians(layers, scores)
            rule = owl if is_owl else dlp
            shares = [rule(values, block_sizes, sparsity) for sparsity in sparsities]
            return [{key: share[block] for key, block in blocks.items()} for share in shares]
        wish = read_allocation(Path(self.kind), layers)
        return [shifted(wish, sizes, sparsity) for sparsity in sparsities]

    def _rounded(
        self, layers: Mapping[str, LayerSpec], target: Target, wish: Mapping[str, float]
    ) -> Budgets:
        if target.pattern is not None:
            return _patterns(layers, target.pattern, wish)
        sizes = {key: layer.num_weights for key, layer in layers.items()}
        steps = {key: self._step(layer) for key, layer in layers.items()}
        counts = rounded(wish, sizes, steps, int(target.budget.sparsity * sum(sizes.values())))
        return {key: Budget(Fraction(count, sizes[key])) for key, count in counts.items()}

    def _step(self, layer: LayerSpec) -> int:
        """How many weights one more in every group of a layer are."""
        if self.is_exact or self.group.axis is None:
            return 1
        return max(layer.shape[self.group.axis] // self.group.size, 1)


def read_allocation(path: Path, layers: Mapping[str, LayerSpec]) -> dict[str, float]:
    """Sparsities by weight key from a JSON object of sparsities by layer name.

    Raises InputError if it is not one, or leaves a layer out.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"--allocation {path}: expected one of {', '.join(ALLOCATIONS)} or a JSON file of "
            "sparsities by layer name"
        ) from error
    wish = {}
    for key, layer in layers.items():
        value = document.get(layer.name) if isinstance(document, dict) else None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
            raise InputError(
                f"--allocation {path}: expected a number from 0 to 1 for layer {layer.name}, got "
                f"{str(value)[:40]}"
            )
        wish[key] = float(value)
    return wish


def own_target(path: Path, layers: Mapping[str, LayerSpec]) -> Target:
    """What a file of sparsities comes to by itself: their mean, weighted by the layers' sizes."""
    wish = read_allocation(path, layers)
    total = sum(layer.num_weights for layer in layers.values())
    mean = math.fsum(wish[key] * layer.num_weights for key, layer in layers.items()) / total
    if mean >= 1:
        raise InputError(f"--allocation {path}: it leaves no weight: expected a mean below 1")
    return Target(mean)


def _block(layer: LayerSpec) -> str:
    """What a layer is grouped under; one outside the blocks stands alone."""
    return layer.name if layer.block is None else f"block {layer.block}"


def _global(
    sizes: Mapping[str, int], targets: Sequence[Target], scores: Scores
) -> list[dict[str, int]]:
    """How many weights of each layer are among the lowest of all, for each target."""
    counts = [int(target.budget.sparsity * sum(sizes.values())) for target in targets]
    ranks = Ranks(partial(_parts, scores, sizes), [max(n - 1, 0) for n in counts])
    none = dict.fromkeys(sizes, 0)
    return [found if n else none for n, found in zip(counts, ranks.upto(), strict=True)]


def _outliers(layers: Iterable[str], scores: Scores) -> dict[str, float]:
    """Each block's share of scores that are above M times its mean."""
    totals: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    outliers: dict[str, int] = defaultdict(int)
    for layer, score_OI in scores(layers):
        totals[_block(layer)] += float(score_OI.sum(dtype=torch.float64))
        counts[_block(layer)] += score_OI.numel()
    for layer, score_OI in scores(layers):
        block = _block(layer)
        outliers[block] += int((score_OI > OWL_OUTLIERS * totals[block] / counts[block]).sum())
    return {block: outliers[block] / count for block, count in counts.items()}


def _medians(layers: Mapping[str, LayerSpec], scores: Scores) -> dict[str, float]:
    """Each block's median score, the lower one of two."""
    keys: dict[str, list[str]] = defaultdict(list)
    for key, layer in layers.items():
        keys[_block(layer)].append(key)
    medians = {}
    for block, inside in keys.items():
        middle = (sum(layers[key].num_weights for key in inside) - 1) // 2
        [medians[block]] = Ranks(partial(_parts, scores, inside), [middle]).values
    return medians


def _parts(scores: Scores, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    return ((layer.weight_key, score_OI) for layer, score_OI in scores(keys))


def _patterns(
    layers: Mapping[str, LayerSpec], pattern: Pattern, wish: Mapping[str, float]
) -> Budgets:
    """An n for each block, from 1 to m, whose weighted mean is as near the pattern's as may be."""
    sizes: dict[str, int] = defaultdict(int)
    pruned: dict[str, float] = defaultdict(float)
    for key, layer in layers.items():
        sizes[_block(layer)] += layer.num_weights
        pruned[_block(layer)] += wish[key] * layer.num_weights
    shares = {block: pruned[block] / size for block, size in sizes.items()}
    shares = shifted(shares, sizes, float(pattern.sparsity), 1 - 1 / pattern.m)
    goal = (pattern.m - pattern.n) * sum(sizes.values())
    parts = whole_parts(shares, sizes, pattern.m, goal)
    kept = {block: Pattern(pattern.m - count, pattern.m) for block, count in parts.items()}
    patterns = {key: kept[_block(layer)] for key, layer in layers.items()}
    return {key: Budget(x.sparsity, x) for key, x in patterns.items()}
