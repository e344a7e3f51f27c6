"""What a pruning did: weights read back from the written files, counted, and reported."""

import shutil
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gradpipe.errors import GradpipeError
from gradpipe.options import recorded_command, recorded_options
from gradpipe.pipeline.prune.config import PruneConfig
from gradpipe.pipeline.prune.coverage import Uncovered
from gradpipe.pipeline.prune.duty import Duty
from gradpipe.pipeline.prune.files import Written
from gradpipe.pipeline.prune.plan import AllocatedPlan, PrunePlan
from gradpipe.pipeline.prune.workers import side_by_side
from gradpipe.pipeline.reports.card import write_report
from gradpipe.pipeline.reports.results import LayerResult, PruneOrder, PruneReport, PruneResult
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.checkpoint.tensors import as_tensor, count_zeros
from gradpipe.stages.prune.methods import METHODS
from gradpipe.stages.prune.target import Target
from gradpipe.store.objects import digest


def missed_target(allocated: AllocatedPlan, target: Target) -> list[str]:
    """A line if mixed patterns do not meet their target: blocks of several sizes may not add up."""
    if target.pattern is None:
        return []
    layers, budgets = allocated.plan.layers, allocated.budgets[target]
    total = sum(layer.num_weights for layer in layers.values())
    pruned = sum(budgets[name].sparsity * layer.num_weights for name, layer in layers.items())
    if pruned == target.budget.sparsity * total:
        return []
    note = (
        f"{target.pattern} mixed by block prunes {float(pruned / total):.2%} of the weights, not "
        f"{float(target.budget.sparsity):.2%}: the blocks' sizes do not add up to it"
    )
    return [note]


def options_of(config: PruneConfig, plan: PrunePlan, target: Target) -> dict[str, Any]:
    """By flag, what was asked for: the same whether or not other targets run beside it."""
    pattern = target.budget.pattern_name
    goal = {"--pattern": pattern} if pattern else {"--sparsity": target.sparsity}
    options = recorded_options(config) | goal
    if config.score is None:
        options["--method"] = config.method
    if "--allocation" in options:
        options["--allocation"] = plan.allocation.name
    return options


def order_of(config: PruneConfig, plan: PrunePlan, target: Target) -> PruneOrder:
    """What is asked for, and of what."""
    options, score = options_of(config, plan, target), plan.chosen.score
    return PruneOrder(
        gradpipe=version("gradpipe"),
        model=plan.checkpoint.label,
        revision=plan.checkpoint.revision,
        store=plan.store.digest,
        method=config.method if config.score is None else config.score,
        score=None if score is None else score.expression.text,
        update=config.update,
        curvature=config.curvature,
        allocation=plan.allocation.name,
        statistics=plan.statistics,
        alpha=config.alpha,
        grad_norm=config.grad_norm,
        group=config.group or METHODS[config.method].group,
        pattern=target.budget.pattern_name or "unstructured",
        command=recorded_command("prune", (plan.checkpoint.label, "STORE", "OUT"), options),
    )


def finish(
    config: PruneConfig, allocated: AllocatedPlan, staging: Path, duty: Duty, written: Written
) -> tuple[PruneResult, ...]:
    """Copy what is not weights, read the weights back, and write the reports.

    Ranks read back in parts; the first writes, and all return the results.
    """
    plan, ranks, results = allocated.plan, duty.ranks, []
    uncovered = Uncovered.of(plan)
    for target in plan.targets:
        folder = plan.folder(staging, target)
        ranks.first(partial(copy_companions, plan.checkpoint, folder))
        read_back = partial(_read_back, allocated, target, folder, duty, written)
        parts = ranks.gathered(ranks.together(read_back))
        found = {layer.name: layer for part in parts for layer in part}
        layers = tuple(found[name] for name in plan.in_order())
        blocks, file = uncovered.shares(plan, layers)
        report = PruneReport(
            order=order_of(config, plan, target),
            requested=float(target.budget.sparsity),
            layers=layers,
            blocks=blocks,
            file=file,
            dense=uncovered.matrices,
            mismatched_layers=tuple(sorted(written.mismatched)),
            unseen_layers=tuple(sorted(plan.unseen)),
            notes=(
                *missed_target(allocated, target),
                *sorted(written.notes),
                *uncovered.lines(),
            ),
        )
        ranks.first(partial(write_report, folder, report))
        results.append(
            PruneResult(folder=plan.folder(config.out, target), label=target.label, report=report)
        )
    return tuple(results)


def copy_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy what is not weights."""
    for path in checkpoint.companions():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.folder / path, folder / path)


def _read_back(
    allocated: AllocatedPlan, target: Target, folder: Path, duty: Duty, written: Written
) -> tuple[LayerResult, ...]:
    """Count the zeros that are really in the written file, which has every tensor in its place."""
    plan, checkpoint = allocated.plan, Checkpoint.open(str(folder))

    def result(name: str) -> LayerResult:
        """One layer, as it stands in the file."""
        place = plan.places[name]
        data = checkpoint.read_place(place)
        if digest(data) != written.digests[target.label][name]:
            raise GradpipeError(
                f"layer {name} reads back from {folder} otherwise than it was written"
            )
        return allocated.result(target, name, count_zeros(as_tensor(data, place)))

    with side_by_side(plan.workers) as pool:
        return tuple(pool.map(result, duty.checked(plan.layers)))
