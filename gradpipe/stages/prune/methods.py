"""Scores: how much each weight matters. Low scores go first.

A method is a formula, or an algorithm that picks weights and updates the rest by second moments.
The norms are scaled so that α means the same at any number N of samples; at N = 128 they are the
reference implementation's.

    ‖X‖₂ = √(Σₜx² / N)       ‖G‖₁ = 128·Σ|G| / N       ‖G‖₂ = √(128·ΣG² / N)       ΣG = 128·ΣG / N

Weights come in any float dtype; scores are float32. Shapes: O out, I in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradpipe.errors import InputError
from gradpipe.stages.prune.formula import Expression
from gradpipe.store.statistics import GRADIENT_STATISTICS, SECOND_MOMENTS

GRAD_NORMS = ("l1", "l2", "sum")

_REFERENCE_SAMPLES = 128

_CHUNK_VALUES = 1 << 20  # of a layer, scored at a time: they stay in a CPU's cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """One layer's statistics, decoded on the device where scores are computed."""

    values: Mapping[str, Tensor]  # Σ|G|, √ΣG², ΣG (O, I); √Σx² (I,); Σxxᵀ (I, I), Σdy dyᵀ (O, O)
    num_samples: Mapping[str, int]  # statistic -> over how many samples

    def of_rows(self, rows: slice) -> Norms:
        """The same of some outputs alone, without second moments."""
        values = {
            name: self.values[name][rows] if name in GRADIENT_STATISTICS else self.values[name]
            for name in self.values.keys() - set(SECOND_MOMENTS)
        }
        return Norms(values=values, num_samples=self.num_samples)

    def activation(self) -> Tensor:
        """‖X‖₂ of each input, (I,)."""
        return self.values["act_l2"] / math.sqrt(self.num_samples["act_l2"])

    def gradient(self, norm: str) -> Tensor:
        """‖G‖₁, ‖G‖₂ or |ΣG| of each weight over samples, (O, I); a tensor of its own."""
        return self._scaled(norm).abs_()

    def gradient_sum(self) -> Tensor:
        """ΣG of each weight over samples, with its sign, (O, I); a tensor of its own."""
        return self._scaled("sum")

    def _scaled(self, norm: str) -> Tensor:
        statistic = f"grad_{norm}"
        ratio = _REFERENCE_SAMPLES / self.num_samples[statistic]
        return self.values[statistic] * (math.sqrt(ratio) if norm == "l2" else ratio)


@dataclass(frozen=True, slots=True)
class Method:
    """How weights are picked: by a formula, or by an algorithm over second moments."""

    formula: str | None
    group: str = "output"  # the weights compared, unless the user says otherwise


METHODS = {
    "magnitude": Method("abs(W)"),  # Han et al., 2015
    "wanda": Method("abs(W)*X"),  # Sun et al., 2023
    "gradient": Method("abs(W)*G"),  # Das et al., 2023, the gradient term alone
    "gblm": Method("abs(W)*(a*G+X)"),  # GBLM-Pruner: Das et al., 2023
    "fisher": Method("W**2*G2**2"),  # the diagonal of the empirical Fisher information
    "ria": Method("ri(W)*sqrt(X)"),  # Zhang et al., 2024
    "gradient-ria": Method("ri(W)*sqrt(a*G+X)"),  # RIA with GBLM's norm in the activation's place
    "sparsegpt": Method(None, "layer"),  # Frantar & Alistarh, 2023
    "alps": Method(None, "layer"),  # Meng et al., 2024
}


@dataclass(frozen=True, slots=True)
class Score:
    """A formula with its choices made."""

    expression: Expression
    grad_norm: str
    alpha: float

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the statistics that it reads from the store."""
        return self.expression.statistics(self.grad_norm)

    def of(self, weight_OI: Tensor, norms: Norms) -> Tensor:
        """The score of each weight, float32 (O, I), a tensor of its own.

        Some rows at a time, so that what the formula's parts yield takes little room; all at once
        where they look at whole columns.
        """
        if self.expression.spans_rows:
            return self._of_rows(weight_OI, norms)
        num_rows = max(1, _CHUNK_VALUES // weight_OI.shape[1])
        score_OI = torch.empty(weight_OI.shape, device=weight_OI.device)
        for start in range(0, len(score_OI), num_rows):
            rows = slice(start, start + num_rows)
            score_OI[rows] = self._of_rows(weight_OI[rows], norms.of_rows(rows))
        return score_OI

    def _of_rows(self, weight_OI: Tensor, norms: Norms) -> Tensor:
        return self.expression.evaluate(
            {
                "W": weight_OI.float,
                "X": norms.activation,
                "G": lambda: norms.gradient(self.grad_norm),
                "G1": lambda: norms.gradient("l1"),
                "G2": lambda: norms.gradient("l2"),
                "GS": norms.gradient_sum,
                "a": lambda: torch.tensor(self.alpha),
            }
        )


def find_score(name_or_formula: str, grad_norm: str, alpha: float) -> Score:
    """A method's score, or the one that a formula gives; InputError for neither."""
    method = METHODS.get(name_or_formula)
    formula = name_or_formula if method is None else method.formula
    if formula is None:
        raise InputError(f"method {name_or_formula} has no score of its own: give a formula")
    return Score(Expression.parse(formula), grad_norm, alpha)
