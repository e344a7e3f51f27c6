"""One model, loaded once, and what every point does to it: pruned in memory, then measured."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console

from gradpipe.errors import GradpipeError
from gradpipe.pipeline.progress import QUIET
from gradpipe.pipeline.prune.allocate import allocate
from gradpipe.pipeline.prune.outcome import options_of
from gradpipe.pipeline.prune.plan import PrunePlan
from gradpipe.pipeline.reports.points import SAMPLES, Named, PointResult, PointSpec
from gradpipe.pipeline.reports.results import LayerResult, Zeros
from gradpipe.pipeline.sweep.alpha import ALPHAS, heldout_windows
from gradpipe.pipeline.sweep.board import Board
from gradpipe.pipeline.sweep.config import AUTO, SweepConfig
from gradpipe.pipeline.sweep.grid import Point
from gradpipe.pipeline.sweep.in_memory import PrunedModel, dense_layers
from gradpipe.pipeline.sweep.measure import Measure, measure_of, of_windows
from gradpipe.stages.device import memory_errors, resolve_device
from gradpipe.stages.model.load import load_model, resolve_dtype
from gradpipe.stages.prune.methods import METHODS
from gradpipe.store.objects import digest
from gradpipe.store.reader import GradientStore

CHOSEN = "--alpha auto"  # among a point's options: how its α was chosen
_VERSIONS = ("gradpipe", "torch", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The dense model or a point, and the key that its line has."""

    key: str
    point: Point | None
    plan: PrunePlan  # of the dense model, any
    options: dict[str, Any]  # by flag, as the line has them


class Bench:
    """A loaded model, and what its points are measured by."""

    def __init__(self, config: SweepConfig, plans: Sequence[PrunePlan], console: Console) -> None:
        """Load the model and draw the data, once; InputError if either cannot be used."""
        checkpoint = plans[0].checkpoint
        evaluation = config.evaluation
        with memory_errors("give --dtype bfloat16, or another --device"):
            dtype = resolve_dtype(evaluation.dtype, checkpoint)
            model = load_model(checkpoint, dtype, resolve_device(evaluation.device))
        self._study = config.study
        self._name = Named(name=checkpoint.label, digest=checkpoint.content_digest())
        self._measure = measure_of(evaluation, checkpoint, model, console)
        self._heldout: Measure | None = None
        if AUTO in config.alphas:
            stores = {plan.store.url: plan.store for plan in plans}
            windows, name = heldout_windows(config, [*stores.values()], checkpoint)
            heldout = of_windows(windows, config.batch_size, checkpoint, model)
            self._heldout = replace(heldout, identity={"dataset": name} | heldout.identity)
        self._pruned = PrunedModel(model, plans[0])

    def task(self, point: Point | None, plan: PrunePlan) -> Task:
        """A point under its key: a digest of all that its numbers follow from."""
        asked: dict[str, Any] = {"model": self._name.digest, "measure": self._measure.identity}
        options: dict[str, Any] = {}
        if point is not None:
            [target] = plan.targets
            options = options_of(point.config, plan, target)
            options |= {"--alpha": AUTO} if point.chooses_alpha else {}
            options[SAMPLES] = plan.store.spec.samples.num_samples
            asked |= {"store": plan.store.digest, "options": options}
            if point.chooses_alpha and self._heldout is not None:
                asked["heldout"] = self._heldout.identity
        key = digest(json.dumps(asked, sort_keys=True).encode())
        return Task(key=key, point=point, plan=plan, options=options)

    def do(self, task: Task, board: Board) -> PointResult:
        """Prune the model to a point, and measure it; GradpipeError if the dense one has NaN."""
        if task.point is None:
            result = self._result(task, dense_layers(task.plan), 0.0, board)
            if result.metric.value is None:
                raise GradpipeError(
                    f"{self._name.name}: the dense model's {self._measure.metric.name} is no "
                    "number: try --dtype bfloat16 or float32, or mend the checkpoint"
                )
            return result
        if task.point.chooses_alpha:
            task = self._with_alpha(task, board)
        start = perf_counter()
        layers = self._prune(task, board)
        return self._result(task, layers, perf_counter() - start, board)

    def _prune(self, task: Task, board: Board) -> list[LayerResult]:
        plan = task.plan
        label = plan.targets[0].label
        with (
            plan.reading_ahead(plan.layers),
            board.step(f"{label}: pruning", len(plan.layers)) as advance,
        ):
            return self._pruned.prune(allocate(plan, QUIET), advance)

    def _with_alpha(self, task: Task, board: Board) -> Task:
        """The task at the α of the least perplexity on text held out from the calibration."""
        assert self._heldout is not None
        tried: dict[float, float] = {}
        for alpha in ALPHAS:
            self._prune(at_alpha(task, alpha), board)
            with board.step(f"α {alpha:g}: measuring", self._heldout.steps) as advance:
                value = self._heldout.value(advance)
            tried[alpha] = math.inf if value is None else value
        chosen = at_alpha(task, min(tried, key=tried.__getitem__))
        how = {
            "dataset": self._heldout.identity["dataset"],
            "windows": self._heldout.identity["windows"][:2],
            "perplexity": {f"{alpha:g}": _finite(value) for alpha, value in tried.items()},
        }
        return replace(chosen, options=chosen.options | {CHOSEN: how})

    def _result(
        self, task: Task, layers: Sequence[LayerResult], seconds: float, board: Board
    ) -> PointResult:
        start = perf_counter()
        label = "dense" if task.point is None else task.plan.targets[0].label
        with board.step(f"{label}: measuring", self._measure.steps) as advance:
            value = self._measure.value(advance)
        zeros = Zeros.sum(layers)
        blocks, file = self._pruned.uncovered.shares(task.plan, layers)
        return PointResult(
            key=task.key,
            study=self._study,
            point=None if task.point is None else _spec(task.point, task.plan),
            options=task.options,
            model=self._name,
            store=Named(name=_name_of(task.plan.store), digest=task.plan.store.digest),
            metric=replace(self._measure.metric, value=_finite(value)),
            zeros={
                "pruned": zeros.sparsity,
                "blocks": blocks.sparsity,
                "file": file.sparsity,
            },
            layers={x.name: x.achieved for x in layers},
            seconds={
                "prune": round(seconds, 3),
                "evaluate": round(perf_counter() - start, 3),
            },
            versions={name: version(name) for name in _VERSIONS},
            measure=self._measure.identity,
        )


def at_alpha(task: Task, alpha: float) -> Task:
    """The same with a number for α."""
    assert task.point is not None
    config = replace(task.point.config, alpha=alpha)
    return replace(
        task,
        point=Point(config=config, chooses_alpha=False),
        plan=PrunePlan.of(config, task.plan.checkpoint, task.plan.store),
        options=task.options | {"--alpha": alpha},
    )


def _spec(point: Point, plan: PrunePlan) -> PointSpec:
    """What a point is told by: None for what has no say in it."""
    config, [target] = point.config, plan.targets
    scores = [score for score in (plan.chosen.score, plan.allocation_score) if score is not None]
    names = frozenset[str]().union(*(score.expression.names for score in scores))
    method = METHODS[config.method]
    has_groups = target.pattern is None and method.compares is None
    is_shared_out = not plan.allocation.keeps_pattern(target)
    return PointSpec(
        method=config.score or config.method,
        sparsity=target.sparsity if target.pattern is None else None,
        pattern=target.budget.pattern_name,
        grad_norm=str(config.grad_norm) if "G" in names else None,
        alpha=float(config.alpha) if "a" in names else None,
        group=str(config.group or method.group) if has_groups else None,
        allocation=str(plan.allocation.name) if is_shared_out else None,
        update=None if method.formula is None else str(config.update),
        recipe=config.recipe,
    )


def _name_of(store: GradientStore) -> str:
    """A folder's own name, or the last part of a URL."""
    folder = store.local_folder
    return Path(store.url).name if folder is None else folder.resolve().name


def _finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None
