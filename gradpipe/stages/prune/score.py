"""One layer's statistics on the device, and the scores that formulas make of them.

Scores say how much each weight matters: low ones go first. They are float32, of weights in any
float dtype.

The norms are scaled so that α means the same at any number N of samples; at N = 128 they are the
reference implementation's.

    ‖X‖₂ = √(Σₜx² / N)       ‖G‖₁ = 128·Σ|G| / N       ‖G‖₂ = √(128·ΣG² / N)       ΣG = 128·ΣG / N

Shapes: O out, I in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gradpipe.errors import GradpipeError
from gradpipe.stages.prune.decode import decode_norms
from gradpipe.stages.prune.methods import Score
from gradpipe.store.codec import Encoded
from gradpipe.store.statistics import GRADIENT_STATISTICS, SECOND_MOMENTS

_REFERENCE_SAMPLES = 128

_CHUNK_VALUES = 1 << 20  # of a layer, scored at a time: they stay in a CPU's cache


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStatistics:
    """One layer's statistics, decoded on the device where scores are computed."""

    values: Mapping[str, Tensor]  # Σ|G|, √ΣG², ΣG (O, I); √Σx² (I,); Σxxᵀ (I, I), Σdy dyᵀ (O, O)
    num_samples: Mapping[str, int]  # statistic -> over how many samples

    @classmethod
    def decode(
        cls, encoded: Mapping[str, Encoded], names: Iterable[str], device: torch.device
    ) -> Self:
        """Move codes to the device, and decode there those of these names."""
        return cls(
            values={name: decode_norms(encoded, name, device) for name in names},
            num_samples={name: item.spec.num_samples for name, item in encoded.items()},
        )

    def of_rows(self, rows: slice) -> LayerStatistics:
        """The same of some outputs alone, without second moments."""
        values = {
            name: self.values[name][rows] if name in GRADIENT_STATISTICS else self.values[name]
            for name in self.values.keys() - set(SECOND_MOMENTS)
        }
        return LayerStatistics(values=values, num_samples=self.num_samples)

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


def score_layer(name: str, weight_OI: Tensor, statistics: LayerStatistics, score: Score) -> Tensor:
    """A layer's scores, float32 (O, I); GradpipeError if one is not a number."""
    score_OI = score_weights(weight_OI, statistics, score)
    if not is_finite(score_OI):
        raise GradpipeError(
            f"layer {name}: a score {score.expression.text} is NaN or infinite, "
            "as its weights or its statistics are, or the formula makes it"
        )
    return score_OI


def score_weights(weight_OI: Tensor, statistics: LayerStatistics, score: Score) -> Tensor:
    """The score of each weight, float32 (O, I), a tensor of its own.

    Some rows at a time, so that what the formula's parts yield takes little room; all at once
    where they look at whole columns.
    """
    if score.expression.spans_rows:
        return _of_rows(weight_OI, statistics, score)
    num_rows = max(1, _CHUNK_VALUES // weight_OI.shape[1])
    score_OI = torch.empty(weight_OI.shape, device=weight_OI.device)
    for start in range(0, len(score_OI), num_rows):
        rows = slice(start, start + num_rows)
        score_OI[rows] = _of_rows(weight_OI[rows], statistics.of_rows(rows), score)
    return score_OI


def _of_rows(weight_OI: Tensor, statistics: LayerStatistics, score: Score) -> Tensor:
    """The formula with this layer's values for its letters."""
    return score.expression.evaluate(
        {
            "W": weight_OI.float,
            "X": statistics.activation,
            "G": lambda: statistics.gradient(score.grad_norm),
            "G1": lambda: statistics.gradient("l1"),
            "G2": lambda: statistics.gradient("l2"),
            "GS": statistics.gradient_sum,
            "a": lambda: torch.tensor(score.alpha),
        },
        torch.tensor,
    )


def is_finite(matrix: Tensor) -> bool:
    """True if no value is NaN or infinite, found without another matrix of the same size."""
    return all(math.isfinite(x) for x in torch.stack(torch.aminmax(matrix)).tolist())
