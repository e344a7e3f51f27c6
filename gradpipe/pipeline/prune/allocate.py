"""How much of each layer goes: passes over weights and statistics before anything is written."""

from __future__ import annotations

from rich.console import Console
from torch import Tensor

from gradpipe.pipeline.progress import progress_bar
from gradpipe.pipeline.prune.files import score_of
from gradpipe.pipeline.prune.plan import AllocatedPlan, PrunePlan
from gradpipe.stages.prune.allocation import Budgets
from gradpipe.stages.prune.score_passes import ScorePasses


def allocate(plan: PrunePlan, console: Console) -> AllocatedPlan:
    """Budgets for each target: those of the target itself for layers that were not seen."""
    uniform = [dict.fromkeys(plan.layers, target.budget) for target in plan.targets]
    is_seen = len(plan.unseen) < len(plan.layers)
    allocated = _allocated(plan, console) if is_seen else uniform
    budgets = [every | seen for every, seen in zip(uniform, allocated, strict=True)]
    return AllocatedPlan(plan=plan, budgets=dict(zip(plan.targets, budgets, strict=True)))


def _allocated(plan: PrunePlan, console: Console) -> list[Budgets]:
    """What the allocation gives layers that were seen."""
    seen, score, rule = plan.seen, plan.allocation_score, plan.allocation.rule
    if score is None:
        return plan.allocation.budgets(seen, plan.targets, scores=None)
    with progress_bar(console, "allocating", rule.num_passes * len(seen), "layers") as advance:

        def compute(name: str) -> Tensor:
            score_OI = score_of(plan, name, score)
            advance(1)
            return score_OI

        return plan.allocation.budgets(seen, plan.targets, ScorePasses(seen, compute))
