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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor

from gradpipe.errors import GradpipeError
from gradpipe.stages.prune.decode import decode_norms
from gradpipe.stages.prune.methods import Score
from gradpipe.store.codec import Encoded
from gradpipe.store.statistics import OUT, STATISTICS, letters

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
            name: value[rows] if STATISTICS[name].has_rows else value
            for name, value in self.values.items()
            if not STATISTICS[name].is_symmetric
        }
        return LayerStatistics(values=values, num_samples=self.num_samples)

    def scaled(self, name: str) -> Tensor:
        """A statistic as formulas have it: ‖X‖₂, ‖G‖₁ …; (O, I), (I,) or, of outputs, (O, 1)."""
        statistic = STATISTICS[name]
        values: Tensor = statistic.unit(self.values[name], self.num_samples[name])
        return values[:, None] if statistic.axes == (OUT,) else values


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
    of = letters(score.grad_norm)
    values: dict[str, Callable[[], Tensor]] = {
        letter: partial(statistics.scaled, name) for letter, name in of.items()
    }
    values |= {
        "W": weight_OI.float,
        "G": lambda: statistics.scaled(of["G"]).abs(),
        "a": lambda: torch.tensor(score.alpha),
    }
    return score.expression.evaluate(values, torch.tensor)


def is_finite(matrix: Tensor) -> bool:
    """True if no value is NaN or infinite, found without another matrix of the same size."""
    return all(math.isfinite(x) for x in torch.stack(torch.aminmax(matrix)).tolist())
