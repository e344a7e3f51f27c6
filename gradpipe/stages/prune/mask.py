"""Masks: which weights stay. True = kept.

Pure functions of a score and a pattern. Counts are exact, ties go to the lower index: the same
scores give the same mask on every device.

Shapes: O out, I in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

import numpy as np
import torch
from torch import Tensor

from gradpipe.errors import InputError

_SELECT_VALUES = 1 << 19

_VECTOR_WIDTH = 16  # from here on NumPy, which selects with vector instructions, is faster on a CPU


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
        """As it was parsed."""
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
        raise InputError(f"group {text!r}: expected output, input, layer, output:K or input:K")


def exact_sparsity(sparsity: float) -> Fraction:
    """The decimal that was meant: 0.29 is 29/100, and 0.29 of 100 weights is 29."""
    return Fraction(repr(float(sparsity)))


def unstructured_mask(score_OI: Tensor, sparsity: Fraction, group: Group) -> Tensor:
    """Prune the ⌊sparsity · group size⌋ lowest scores of each group."""
    if group.axis is None:
        return _keep_highest(score_OI.reshape(1, -1), sparsity).view_as(score_OI)
    if group.axis == 1 and group.size == 1:
        return _mask_rows(score_OI.T.contiguous(), sparsity, 1).T
    if group.axis == 1:
        return _mask_columns(score_OI, sparsity, group.size)
    return _mask_rows(score_OI, sparsity, group.size)


def pattern_mask(score_OI: Tensor, pattern: Pattern) -> Tensor:
    """Keep the `n` highest scores of every `m` consecutive inputs."""
    groups = score_OI.reshape(-1, pattern.m)
    return _keep_highest(groups, pattern.sparsity).view_as(score_OI)


def check_pattern(pattern: Pattern, name: str, width: int) -> None:
    """Refuse a layer whose input width does not divide into groups of `m`."""
    if width % pattern.m:
        raise InputError(
            f"pattern {pattern}: layer {name} has {width} inputs, not divisible by {pattern.m}: "
            f"--exclude it or choose another pattern"
        )


def lowest_mask(scores: Tensor, count: int) -> Tensor:
    """False at the `count` lowest of all, ties to the lower index."""
    return _keep_rows(scores.reshape(1, -1), count).view_as(scores)


def _mask_rows(score_OI: Tensor, sparsity: Fraction, size: int) -> Tensor:
    """Groups of `size` rows; the last may be smaller."""
    whole = score_OI.shape[0] - score_OI.shape[0] % size
    parts = [_keep_highest(score_OI[:whole].reshape(-1, size * score_OI.shape[1]), sparsity)]
    if whole < score_OI.shape[0]:
        parts.append(_keep_highest(score_OI[whole:].reshape(1, -1), sparsity))
    return torch.cat([part.reshape(-1, score_OI.shape[1]) for part in parts])


def _mask_columns(score_OI: Tensor, sparsity: Fraction, size: int) -> Tensor:
    """Groups of `size` columns over all rows, flattened row by row so that ties fall as said."""
    columns = score_OI.split(size, dim=1)
    masks = [_keep_highest(part.reshape(1, -1), sparsity).view_as(part) for part in columns]
    return torch.cat(masks, dim=1)


def _keep_highest(scores_GN: Tensor, sparsity: Fraction) -> Tensor:
    """Per row: False at the ⌊sparsity · N⌋ lowest, ties to the lower index."""
    count = scores_GN.shape[1] * sparsity.numerator // sparsity.denominator
    num_rows = max(1, _SELECT_VALUES // scores_GN.shape[1])  # selecting takes four times their room
    return torch.cat([_keep_rows(part, count) for part in scores_GN.split(num_rows)])


def _threshold(scores_GN: Tensor, count: int) -> Tensor:
    """Per row: the `count`-th lowest, (G, 1)."""
    if scores_GN.is_cuda or scores_GN.shape[1] < _VECTOR_WIDTH:
        return scores_GN.kthvalue(count, dim=1, keepdim=True).values
    place = count - 1
    return torch.from_numpy(np.partition(scores_GN.numpy(), place, axis=1)[:, place, None])


def _keep_rows(scores_GN: Tensor, count: int) -> Tensor:
    """Per row: False at the `count` lowest."""
    if count == 0:
        return torch.ones_like(scores_GN, dtype=torch.bool)
    threshold_G1 = _threshold(scores_GN, count)
    pruned = scores_GN < threshold_G1
    ties = scores_GN == threshold_G1
    wanted_G1 = count - pruned.sum(dim=1, keepdim=True)
    if bool((ties.sum(dim=1, keepdim=True) > wanted_G1).any()):
        ties &= ties.cumsum(dim=1) <= wanted_G1
    return ~(pruned | ties)
