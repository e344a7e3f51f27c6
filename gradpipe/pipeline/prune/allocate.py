"""How much of each layer goes: passes over weights and statistics before anything is written."""

from rich.console import Console
from torch import Tensor

from gradpipe.pipeline.progress import QUIET, progress_bar
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
    total = plan.allocation.rule.num_passes * len(plan.seen)
    shown = console if total else QUIET
    with progress_bar(shown, "allocating", total, "layers") as advance:

        def compute(name: str) -> Tensor:
            assert plan.allocation_score is not None  # a rule with passes has one
            score_OI = score_of(plan, name, plan.allocation_score)
            advance(1)
            return score_OI

        scores = ScorePasses(plan.seen, compute)
        return plan.allocation.budgets(plan.seen, plan.targets, scores)
