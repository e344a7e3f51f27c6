"""What a pruning will do, decided before anything is written: a plan, then budgets for it."""

import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from gradpipe.errors import InputError
from gradpipe.pipeline.prune.config import PruneConfig
from gradpipe.pipeline.prune.layers import check_statistics, check_widths, place_of, select_layers
from gradpipe.pipeline.prune.wide import check_decompositions
from gradpipe.pipeline.prune.workers import worker_count
from gradpipe.pipeline.reports.results import LayerResult
from gradpipe.stages.checkpoint.folder import Checkpoint, check_unquantized
from gradpipe.stages.checkpoint.tensors import TensorInfo
from gradpipe.stages.device import resolve_device
from gradpipe.stages.prune.allocation import (
    ALLOCATIONS,
    GLOBAL,
    Allocation,
    AllocationFile,
    AllocationRule,
    find_rule,
)
from gradpipe.stages.prune.methods import METHODS, UPDATES, ChosenMethod, Score
from gradpipe.stages.prune.target import Budget, Group, Target, parse_targets
from gradpipe.store.objects import digest
from gradpipe.store.reader import GradientStore
from gradpipe.store.schema import LayerSpec

Layers = Mapping[str, LayerSpec]  # by name
_DEFAULT_SPARSITY = 0.5
_GLOBAL_GROUP = "global"  # of --group: all weights of all layers are compared


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    """What a run works on, and how, once every check has passed."""

    checkpoint: Checkpoint
    store: GradientStore
    layers: Layers
    places: Mapping[str, TensorInfo]  # by layer name: where its weights lie
    unseen: frozenset[str]  # names of layers that no calibration token reached: experts
    seen: Layers  # the others; all, if tokens reached none
    chosen: ChosenMethod
    chosen_unseen: ChosenMethod  # for those layers
    targets: tuple[Target, ...]
    allocation: Allocation
    allocation_score: Score | None  # what the allocation looks at, if at anything
    statistics: tuple[str, ...]  # read from the store
    device: torch.device
    workers: int  # layers worked on at once
    warning: str | None  # what the user should know before it begins
    allow_mismatch: bool  # prune weights that were not measured

    @classmethod
    def of(cls, config: PruneConfig, checkpoint: Checkpoint, store: GradientStore) -> Self:
        """Decide everything; InputError if checkpoint, store and options do not fit together."""
        check_unquantized(checkpoint)
        file = _read_allocation(config)
        targets = _targets(config, file)
        chosen = _chosen(config)
        allocation = _allocation(config, file)
        score = _allocation_score(config, allocation, chosen)
        looked_at = () if score is None else score.statistics
        statistics = tuple(dict.fromkeys((*chosen.statistics, *looked_at)))
        layers = select_layers(config, checkpoint, store)
        if file is not None and not (config.include or config.exclude):
            file.check_names(layers)
        places = {x.name: place_of(config, checkpoint, store, x) for x in layers.values()}
        check_statistics(config, store, layers.values(), statistics)
        check_widths(layers.values(), targets)
        device = resolve_device(config.device)
        is_read = bool(statistics)
        unseen = frozenset(x.name for x in layers.values() if is_read and store.is_unseen(x))
        seen = {name: layer for name, layer in layers.items() if name not in unseen} or layers
        if file is not None and not targets:
            targets = (file.own_target(seen),)
        return cls(
            checkpoint=checkpoint,
            store=store,
            layers=layers,
            places=places,
            unseen=unseen,
            seen=seen,
            chosen=chosen,
            chosen_unseen=chosen.by_magnitude(),
            targets=targets,
            allocation=allocation,
            allocation_score=score,
            statistics=statistics,
            device=device,
            workers=worker_count(config.workers, device),
            warning=check_decompositions(layers.values(), config.method, chosen, device),
            allow_mismatch=config.allow_mismatch,
        )

    def chosen_for(self, name: str) -> ChosenMethod:
        """How a layer is pruned."""
        return self.chosen_unseen if name in self.unseen else self.chosen

    def in_file(self, file: str) -> list[str]:
        """The layers whose weights are in a file, in its order."""
        names = (name for name in self.layers if self.places[name].file == file)
        return sorted(names, key=lambda name: self.places[name].start)

    def in_order(self) -> list[str]:
        """The layers as reports list them: by their tensors' names."""
        return sorted(self.layers, key=lambda x: (self.places[x].key, self.places[x].start))

    def reading_ahead(self, layers: Iterable[str]) -> AbstractContextManager[None]:
        """While inside, these layers' statistics come from far away in the order of the files."""
        wanted = self.seen.keys() & set(layers)
        names = [name for file in self.checkpoint.files for name in self.in_file(file)]
        return self.store.reading_ahead([self.layers[x] for x in names if x in wanted])

    def folder(self, root: Path, target: Target) -> Path:
        """Where a target goes below the output folder: one needs no folder of its own."""
        return root if len(self.targets) == 1 else root / target.label


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatedPlan:
    """A plan, and how much of each layer goes."""

    plan: PrunePlan
    budgets: Mapping[Target, Mapping[str, Budget]]  # by layer name

    def of_layer(self, name: str) -> list[Budget]:
        """A layer's budgets, in the targets' order."""
        return [self.budgets[target][name] for target in self.plan.targets]

    def result(self, target: Target, name: str, zeros: int) -> LayerResult:
        """What became of a layer, in which so many zeros were found."""
        budget = self.budgets[target][name]
        return LayerResult(
            name=name,
            requested=float(budget.sparsity),
            pattern=budget.pattern_name,
            zeros=zeros,
            size=self.plan.layers[name].num_weights,
        )


def _targets(config: PruneConfig, file: AllocationFile | None) -> tuple[Target, ...]:
    """The checkpoints to write, in order; none given a file of sparsities alone."""
    has_own = bool(config.patterns) or file is not None
    sparsities = config.sparsities or (() if has_own else (_DEFAULT_SPARSITY,))
    return parse_targets(sparsities, config.patterns)


def _chosen(config: PruneConfig) -> ChosenMethod:
    return ChosenMethod(
        method=METHODS[config.method],
        score=config.own_score,
        update=UPDATES[config.update],
        curvature=config.curvature,
        group=_group(config),
    )


def _group(config: PruneConfig) -> Group:
    if config.group == _GLOBAL_GROUP:
        return Group.parse("layer")  # once each layer has its budget
    return Group.parse(config.group or METHODS[config.method].group)


def _allocation(config: PruneConfig, file: AllocationFile | None) -> Allocation:
    rule, name = find_rule(config.allocation), config.allocation
    if file is not None:
        rule, name = AllocationRule(wish=file.wish), file.name
    assert rule is not None  # or there would be a file
    return Allocation(
        name=name,
        rule=GLOBAL if config.group == _GLOBAL_GROUP else rule,
        group=_group(config),
        whole_counts=METHODS[config.method].whole_counts,
        mixes_patterns=config.mixed_patterns,
    )


def _allocation_score(
    config: PruneConfig, allocation: Allocation, chosen: ChosenMethod
) -> Score | None:
    """What the rule looks at: what the user says, what the rule says, or the method's own."""
    if not allocation.rule.num_passes:
        return None
    score = config.score_of_allocation or chosen.score
    if score is None:
        raise InputError(
            f"--allocation {allocation.name} looks at the method's score, and {config.method} has "
            "none: give --allocation-score"
        )
    return score


def _read_allocation(config: PruneConfig) -> AllocationFile | None:
    """The file of sparsities that `--allocation` names, if it names no rule.

    Reports call it by its own name and what it holds: never by its path.
    """
    if find_rule(config.allocation) is not None:
        return None
    path = Path(config.allocation)
    try:
        data = path.read_bytes()
        document = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"--allocation {path}: expected one of {', '.join(ALLOCATIONS)} or a JSON file of "
            "sparsities by layer name"
        ) from error
    name = f"{path.name} (xxh3 {digest(data)})"
    return AllocationFile(path=config.allocation, name=name, document=document)
