"""How much goes: of one layer (`Budget`), of one checkpoint (`Target`)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from gradpipe.stages.prune.mask import (
    Group,
    Pattern,
    exact_sparsity,
    pattern_mask,
    unstructured_mask,
)


def pattern_name(budget: Budget) -> str | None:
    """`2:4`; None for a budget without a pattern."""
    return None if budget.pattern is None else str(budget.pattern)


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of one layer goes: a share of its weights, or by a pattern."""

    sparsity: Fraction
    pattern: Pattern | None = None

    def mask(self, score_OI: Tensor, group: Group) -> Tensor:
        """True = kept, (O, I)."""
        if self.pattern is not None:
            return pattern_mask(score_OI, self.pattern)
        return unstructured_mask(score_OI, self.sparsity, group)


@dataclass(frozen=True, slots=True)
class Target:
    """One checkpoint to be written: a sparsity, or an n:m pattern."""

    sparsity: float
    pattern: Pattern | None = None

    @property
    def label(self) -> str:
        """Folder name when there are several: `s0.50`, `2-4`."""
        if self.pattern is not None:
            return f"{self.pattern.n}-{self.pattern.m}"
        return (
            f"s{self.sparsity:.2f}"
            if round(self.sparsity, 2) == self.sparsity
            else f"s{self.sparsity!r}"
        )

    @property
    def budget(self) -> Budget:
        """What every layer gets where all get the same."""
        if self.pattern is not None:
            return Budget(self.pattern.sparsity, self.pattern)
        return Budget(exact_sparsity(self.sparsity))
