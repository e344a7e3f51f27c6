"""What a solver is given, and what it must answer: the face between a method and a layer.

A solver is built once for a layer, which is where everything that does not depend on the budget is
done, and then asked for one budget after the other. Shapes: O out, I in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from gradpipe.stages.prune.curvature import Curvature
from gradpipe.stages.prune.score import LayerStatistics
from gradpipe.stages.prune.target import Budget, Group


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProblem:
    """One layer on the device. A solver keeps of it what it still needs, and no more."""

    name: str
    weight: Tensor  # (O, I), in the checkpoint's dtype; not to be written to
    statistics: LayerStatistics  # what the method reads; not second moments, which are used up
    damped: Curvature | None  # those, damped; None for a method that minimises no curvature
    group: Group  # the weights to compare with each other
    budgets: tuple[Budget, ...]  # what the solver is asked for, in this order

    @property
    def curvature(self) -> Curvature:
        """What a solver minimises whose entry names curvatures."""
        if self.damped is None:
            raise ValueError(f"layer {self.name}: the method's entry names no curvature")
        return self.damped


class Solver(Protocol):
    """Picks a layer's weights for any budget."""

    def to(self, budget: Budget) -> tuple[Tensor, Tensor]:
        """The layer's weights, in any float dtype, and the mask, True = kept: both (O, I).

        Weights outside the mask may hold anything: they are set to zero.
        """


UpdateKept = Callable[[Tensor], Tensor]  # a mask (O, I) -> the weights that go with it
MakeUpdate = Callable[[LayerProblem], UpdateKept]  # as a solver: once for each layer
