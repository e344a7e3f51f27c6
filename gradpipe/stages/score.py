"""Scores: how much each weight matters. Low scores go first.

A method is one function and one line in `METHODS`. The norms are scaled so that α means the same
at any number N of samples; at N = 128 they are the reference implementation's.

    ‖X‖₂ = √(Σₜx² / N)      ‖G‖₁ = 128·Σ|G| / N      ‖G‖₂ = √(128·ΣG² / N)      |ΣG| = 128·|ΣG| / N

Weights come in any float dtype; scores are float32. Layers are large, so that no more tensors of
their size are made than needed. Shapes: O out, I in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

GRAD_NORMS = ("l1", "l2", "sum")
_REFERENCE_SAMPLES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """One layer's statistics as norms, decoded on the device where scores are computed."""

    values: Mapping[str, Tensor]  # statistic -> float32 (O, I) or (I,): Σ|G|, √ΣG², ΣG, √Σx²
    num_samples: Mapping[str, int]  # statistic -> over how many samples

    def activation(self) -> Tensor:
        """‖X‖₂ of each input, (I,)."""
        return self.values["act_l2"] / math.sqrt(self.num_samples["act_l2"])

    def gradient(self, norm: str) -> Tensor:
        """‖G‖₁, ‖G‖₂ or |ΣG| of each weight over samples, (O, I); a tensor of its own."""
        statistic = f"grad_{norm}"
        ratio = _REFERENCE_SAMPLES / self.num_samples[statistic]
        return (self.values[statistic] * (math.sqrt(ratio) if norm == "l2" else ratio)).abs_()


def magnitude(weight_OI: Tensor, _: Norms, __: str, ___: float) -> Tensor:
    """|W| (Han et al., 2015)."""
    return weight_OI.abs().float()


def wanda(weight_OI: Tensor, norms: Norms, _: str, __: float) -> Tensor:
    """|W|·‖X‖₂ (Sun et al., 2023, eq. 1)."""
    return weight_OI.abs().float() * norms.activation()


def gradient(weight_OI: Tensor, norms: Norms, grad_norm: str, _: float) -> Tensor:
    """|W|·‖G‖ₚ (Das et al., 2023, the gradient term alone)."""
    return norms.gradient(grad_norm).mul_(weight_OI.abs())


def gblm(weight_OI: Tensor, norms: Norms, grad_norm: str, alpha: float) -> Tensor:
    """|W|·(α·‖G‖ₚ + ‖X‖₂) (GBLM-Pruner: Das et al., 2023, eq. 5)."""
    score_OI = norms.gradient(grad_norm).mul_(alpha).add_(norms.activation())
    return score_OI.mul_(weight_OI.abs())


@dataclass(frozen=True, slots=True)
class Method:
    """A score and the statistics that it needs; `grad` stands for the gradient norm chosen."""

    score: Callable[[Tensor, Norms, str, float], Tensor]
    needs: tuple[str, ...] = ()

    def statistics(self, grad_norm: str) -> tuple[str, ...]:
        """Names of the statistics to read for this gradient norm."""
        return tuple(f"grad_{grad_norm}" if name == "grad" else name for name in self.needs)


METHODS = {
    "magnitude": Method(magnitude),
    "wanda": Method(wanda, ("act_l2",)),
    "gradient": Method(gradient, ("grad",)),
    "gblm": Method(gblm, ("grad", "act_l2")),
}
