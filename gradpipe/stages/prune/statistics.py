"""One layer's statistics on the device, scaled as formulas want them.

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

from gradpipe.stages.prune.decode import decode_norms
from gradpipe.store.codec import Encoded
from gradpipe.store.statistics import GRADIENT_STATISTICS, SECOND_MOMENTS

_REFERENCE_SAMPLES = 128


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
