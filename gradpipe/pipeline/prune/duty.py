"""Which layers, and which bytes between them, are one rank's to write, and which to read back.

Layers are shared out by what they cost, not by file: a checkpoint in one file profits too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from gradpipe.pipeline.prune.plan import PrunePlan
from gradpipe.pipeline.ranks import Ranks, shared_out


@dataclass(frozen=True, slots=True)
class Duty:
    """What is one rank's of a pruning."""

    ranks: Ranks
    owners: dict[str, int]  # layer -> the rank that writes it
    files: dict[str, int]  # file -> the rank that copies what is in no layer

    @classmethod
    def of(cls, plan: PrunePlan, ranks: Ranks) -> Self:
        """Shared out among ranks; all of it for one alone."""
        costs = [_cost(plan, name) for name in plan.layers]
        files = plan.checkpoint.files
        return cls(
            ranks=ranks,
            owners=dict(zip(plan.layers, shared_out(costs, ranks.count), strict=True)),
            files={file: index % ranks.count for index, file in enumerate(files)},
        )

    def layers(self, names: Iterable[str]) -> list[str]:
        """Those of the layers that are this rank's to write."""
        return [name for name in names if self.owners[name] == self.ranks.index]

    def checked(self, names: Iterable[str]) -> list[str]:
        """Those that are this rank's to read back: what another wrote, as others will see it."""
        before = (self.ranks.index - 1) % self.ranks.count
        return [name for name in names if self.owners[name] == before]

    def has_rest_of(self, file: str) -> bool:
        """Whether this rank copies what is in no layer."""
        return self.files[file] == self.ranks.index


def _cost(plan: PrunePlan, name: str) -> int:
    """About how long a layer takes: a solver goes through its inputs, a formula does not."""
    layer = plan.layers[name]
    is_solved = plan.chosen_for(name).method.solver is not None
    return layer.num_weights * (layer.shape[1] if is_solved else 1)
