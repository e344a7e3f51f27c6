"""How much goes: of one layer (`Budget`), of one checkpoint (`Target`); compared within what.

Numbers and names alone, without torch: options are checked against them before it is loaded.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

from gradpipe.errors import InputError, did_you_mean


@dataclass(frozen=True, slots=True)
class Pattern:
    """`n` weights kept of every `m` along the input."""

    n: int
    m: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """The pattern in `2:4`; InputError for anything else, n > m or n = 0."""
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
        if not match:
            raise InputError(
                f"pattern {text!r}: expected n:m, n weights kept of every m, such as 2:4"
            )
        n, m = int(match[1]), int(match[2])
        if not 1 <= n <= m:
            raise InputError(
                f"pattern {text}: cannot keep {n} weights of every {m}: expected n ≤ m, n ≥ 1"
            )
        return cls(n, m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> Fraction:
        """The share of weights that go."""
        return Fraction(self.m - self.n, self.m)


@dataclass(frozen=True, slots=True)
class Group:
    """The weights compared with each other: `size` rows (axis 0) or columns (axis 1), or all."""

    axis: int | None
    size: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """`output`, `input`, `layer`, `output:128`, `input:128`; InputError for anything else."""
        match = re.fullmatch(r"(output|input)(?::([1-9]\d{0,8}))?", text)
        if match:
            return cls(0 if match[1] == "output" else 1, int(match[2] or 1))
        if text == "layer":
            return cls(None)
        near = did_you_mean(text, ("output", "input", "layer", "global"))
        raise InputError(
            f"group {text!r}: expected output, input, layer, global, output:K or input:K{near}"
        )


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of one layer goes: a share of its weights, or by a pattern."""

    sparsity: Fraction
    pattern: Pattern | None = None

    @property
    def pattern_name(self) -> str | None:
        """`2:4`; None without a pattern."""
        return None if self.pattern is None else str(self.pattern)


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


def parse_targets(sparsities: Iterable[float], patterns: Iterable[str]) -> tuple[Target, ...]:
    """The checkpoints to write, sparsities first; InputError for a pattern that is none."""
    parsed = [Pattern.parse(text) for text in patterns]
    return (
        *(Target(sparsity) for sparsity in sparsities),
        *(Target(float(pattern.sparsity), pattern) for pattern in parsed),
    )


def exact_sparsity(sparsity: float) -> Fraction:
    """The decimal that was meant: 0.29 is 29/100, and 0.29 of 100 weights is 29."""
    return Fraction(repr(float(sparsity)))
