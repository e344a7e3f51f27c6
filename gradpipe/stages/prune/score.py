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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import Self

import torch
from torch import Tensor

from gradpipe.errors import GradpipeError
from gradpipe.stages.prune.decode import Logarithms, decode_norms
from gradpipe.stages.prune.methods import Score
from gradpipe.store.codec import Encoded
from gradpipe.store.statistics import OUT, STATISTICS, letters

_CHUNK_VALUES = 1 << 17  # of a layer, scored at a time: they stay in a CPU's cache


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStatistics:
    """One layer's statistics on the device where scores are computed."""

    values: Mapping[str, Tensor]  # Σ|G|, √ΣG², ΣG (O, I); √Σx² (I,); Σxxᵀ (I, I), Σdy dyᵀ (O, O)
    num_samples: Mapping[str, int]  # statistic -> over how many samples
    codes: Mapping[str, Logarithms] = field(default_factory=dict)  # others, still to be decoded

    @classmethod
    def decode(
        cls, encoded: Mapping[str, Encoded], names: Iterable[str], device: torch.device
    ) -> Self:
        """Move codes to the device, and decode there those of these names, but for logarithms."""
        logs = [name for name in names if encoded[name].spec.encoding == "log"]
        return cls(
            values={x: decode_norms(encoded, x, device) for x in names if x not in logs},
            num_samples={name: item.spec.num_samples for name, item in encoded.items()},
            codes={name: Logarithms.of(encoded, name, device) for name in logs},
        )

    def parts(self, num_rows: int) -> Iterator[LayerStatistics]:
        """The same of so many outputs, decoded, and of the next; without second moments."""
        values = {x: v for x, v in self.values.items() if not STATISTICS[x].is_symmetric}
        split: dict[str, Iterable[Tensor]] = {
            **{x: v.split(num_rows) for x, v in values.items() if STATISTICS[x].has_rows},
            **{name: codes.parts(num_rows) for name, codes in self.codes.items()},
        }
        for some in zip(*split.values(), strict=True) if split else repeat(()):
            part = values | dict(zip(split, some, strict=True))
            yield LayerStatistics(values=part, num_samples=self.num_samples)

    def scaled(self, name: str) -> Tensor:
        """A statistic as formulas have it: ‖X‖₂, ‖G‖₁ …; (O, I), (I,) or, of outputs, (O, 1)."""
        statistic = STATISTICS[name]
        norms = self.codes[name].whole() if name in self.codes else self.values[name]
        values: Tensor = statistic.unit(norms, self.num_samples[name])
        return values[:, None] if statistic.axes == (OUT,) else values


def score_layer(name: str, weight_OI: Tensor, statistics: LayerStatistics, score: Score) -> Tensor:
    """A layer's scores, float32 (O, I); GradpipeError if one is not a number."""
    return torch.cat(list(score_parts(name, weight_OI, statistics, score)))


def score_parts(
    name: str, weight_OI: Tensor, statistics: LayerStatistics, score: Score, multiple: int = 1
) -> Iterator[Tensor]:
    """The same, some rows after the other, a `multiple` each: they stay in a core's own cache.

    All at once where the formula looks at whole columns.
    """
    num_rows = max(1, _CHUNK_VALUES // (weight_OI.shape[1] * multiple)) * multiple
    if score.expression.spans_rows:
        num_rows = len(weight_OI)
    weights, parts = weight_OI.split(num_rows), statistics.parts(num_rows)
    for weight_RI, part in zip(weights, parts, strict=False):  # parts may have no end
        score_RI = _of_rows(weight_RI, part, score)
        if not is_finite(score_RI):
            raise GradpipeError(
                f"layer {name}: a score {score.expression.text} is NaN or infinite, "
                "as its weights or its statistics are, or the formula makes it"
            )
        yield score_RI


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
