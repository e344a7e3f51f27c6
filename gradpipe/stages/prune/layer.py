"""One layer of stage two: score or solve once, then weights for every budget.

Shapes: O out, I in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import torch
from torch import Tensor

from gradpipe.errors import GradpipeError
from gradpipe.stages.prune.curvature import Curvature
from gradpipe.stages.prune.mask import budget_masks
from gradpipe.stages.prune.methods import ChosenMethod, Score, Update
from gradpipe.stages.prune.score import LayerStatistics, is_finite, score_parts
from gradpipe.stages.prune.solver import LayerProblem, Solver
from gradpipe.stages.prune.target import Budget


class Scored:
    """The solver of a formula: masks by score, and the update of what stays."""

    def __init__(self, problem: LayerProblem, score: Score, update: Update) -> None:
        """Pick the masks of all budgets, some rows at a time where groups are of rows."""
        group, budgets = problem.group, tuple(dict.fromkeys(problem.budgets))
        scored = partial(score_parts, problem.name, problem.weight, problem.statistics, score)
        if group.axis == 0:
            parts = scored(multiple=group.size)
        else:
            parts = iter([torch.cat(list(scored()))])
        masks = zip(*(budget_masks(part, budgets, group) for part in parts), strict=True)
        self._masks = {x: torch.cat(some) for x, some in zip(budgets, masks, strict=True)}
        weight_OI = problem.weight
        self._updated = (lambda _: weight_OI) if update.make is None else update.make(problem)

    def to(self, budget: Budget) -> tuple[Tensor, Tensor]:
        """Weights and mask, (O, I)."""
        return self._updated(self._masks[budget]), self._masks[budget]


@dataclass(frozen=True, slots=True, kw_only=True)
class SolvedLayer:
    """A layer, ready for any budget."""

    name: str
    weight: Tensor  # (O, I)
    transposed: bool  # True where the checkpoint keeps (in, out)
    solver: Solver
    notes: tuple[str, ...]  # messages for the user, such as that damping was raised

    @classmethod
    def of(
        cls,
        name: str,
        weight: Tensor,
        statistics: LayerStatistics,
        chosen: ChosenMethod,
        budgets: Sequence[Budget],
        *,
        transposed: bool,
    ) -> Self:
        """Do once what these budgets need; `weight` is as the checkpoint keeps it.

        Uses up the second moments among the statistics. Raises GradpipeError if a weight or a
        score is not a number, or if a second moment is singular whatever the damping.
        """
        if not is_finite(weight):
            raise GradpipeError(f"layer {name}: its weights hold NaN or infinite values")
        weight_OI = weight.T if transposed else weight
        moments = {x: statistics.values[x] for x in chosen.second_moments}
        problem = LayerProblem(
            name=name,
            weight=weight_OI,
            statistics=statistics,
            damped=Curvature.of(name, moments["hessian"], moments.get("grad_cov"))
            if moments
            else None,
            group=chosen.group,
            budgets=tuple(budgets),
        )
        if chosen.score is not None:
            solver: Solver = Scored(problem, chosen.score, chosen.update)
        else:
            assert chosen.method.solver is not None  # a method has a formula or a solver
            solver = chosen.method.solver(problem)
        return cls(
            name=name,
            weight=weight_OI,
            transposed=transposed,
            solver=solver,
            notes=() if problem.damped is None else tuple(problem.damped.notes),
        )

    def to(self, budget: Budget) -> Tensor:
        """The pruned weight on the CPU, as the checkpoint keeps it; GradpipeError if infinite."""
        updated_OI, mask_OI = self.solver.to(budget)
        pruned_OI = _masked(updated_OI.to(self.weight.dtype), mask_OI)
        if updated_OI is not self.weight:
            pruned_OI += 0.0  # what was rounded to −0 becomes +0
            if not is_finite(pruned_OI):
                raise GradpipeError(
                    f"layer {self.name}: an updated weight is beyond {self.weight.dtype}: choose "
                    "one that leaves weights as they are"
                )
        return (pruned_OI.T if self.transposed else pruned_OI).contiguous().cpu()


def _masked(weight_OI: Tensor, mask_OI: Tensor) -> Tensor:
    """Zeros outside the mask: bits times 0 or 1, as a CPU guesses half the branches of a mask."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight_OI.element_size()]
    bits_OI = weight_OI.view(bits)
    if bits_OI.is_cuda:
        return (bits_OI * mask_OI).view(weight_OI.dtype)
    masked_OI = np.multiply(bits_OI.numpy(), mask_OI.numpy())  # torch makes a wide mask of it first
    return torch.from_numpy(masked_OI).view(weight_OI.dtype)
