"""Accumulators: float32 sums over calibration samples, one set per layer.

What is summed, and how, stands in the entries of `STATISTICS`; here the samples come to them.

The per-sample gradient of a linear map Y = X Wᵀ is G_b = dY_bᵀ X_b, the same products as the
ordinary weight gradient, kept apart by sample. Norms over samples (GBLM-Pruner, eq. 3-4) need
Σ_b|G_b| and Σ_b G_b², which no sum of gradients can give back.

Shapes: T tokens of one sample (for an expert, those routed to it), I in, O out.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradpipe.errors import GradpipeError
from gradpipe.store.codec import square
from gradpipe.store.schema import LayerSpec
from gradpipe.store.statistics import (
    INPUTS,
    OUTPUT_GRADIENTS,
    OUTPUTS,
    STATISTICS,
    WEIGHT_GRADIENTS,
    LayerStats,
    Statistic,
    Sums,
)

_TILE_BYTES = 2 << 20  # a tile of G stays in the CPU's cache while it is folded into the sums
_VALUES = (INPUTS, OUTPUTS, OUTPUT_GRADIENTS, WEIGHT_GRADIENTS)


class LayerAccumulator:
    """The sums of one layer."""

    def __init__(self, spec: LayerSpec, statistics: tuple[str, ...], device: torch.device) -> None:
        self.spec = spec
        own = sorted((STATISTICS[name] for name in spec.own(statistics)), key=lambda x: x.uses_up)
        self._of = {of: [x for x in own if x.of == of] for of in _VALUES}
        self.sums = {
            x.name: torch.zeros(x.sum_shape(spec.shape), dtype=torch.float32, device=device)
            for x in own
        }
        self.num_samples = 0
        self.num_tokens = 0

    @property
    def needs_gradients(self) -> bool:
        """True if any statistic needs a backward pass."""
        return bool(self._of[OUTPUT_GRADIENTS] or self._of[WEIGHT_GRADIENTS])

    @property
    def has_zero_gradients(self) -> bool:
        """True if it has seen tokens, and all that it sums of gradients is zero."""
        names = [x.name for of in (OUTPUT_GRADIENTS, WEIGHT_GRADIENTS) for x in self._of[of]]
        sums = (self.sums[name] for name in names)
        return bool(names) and self.num_tokens > 0 and not any(bool(x.any()) for x in sums)

    @property
    def needs_outputs(self) -> bool:
        """True if any statistic is of the layer's outputs."""
        return bool(self._of[OUTPUTS])

    def add_inputs(self, xs_TI: Sequence[Tensor]) -> None:
        """Count a batch, and add each sample's inputs to the sums over inputs."""
        self.num_samples += len(xs_TI)
        self.num_tokens += sum(map(len, xs_TI))
        self._add_each(INPUTS, xs_TI)

    def add_outputs(self, ys_TO: Sequence[Tensor]) -> None:
        """Add each sample's outputs to the sums over outputs."""
        self._add_each(OUTPUTS, ys_TO)

    def add_gradients(
        self, xs_TI: Sequence[Tensor], dys_TO: Sequence[Tensor], scale: float
    ) -> None:
        """Add each sample's gradient; `scale` is what the loss was multiplied by."""
        self._add_each(OUTPUT_GRADIENTS, dys_TO, scale)
        if not self._of[WEIGHT_GRADIENTS]:
            return
        for x_TI, dy_TO in zip(xs_TI, dys_TO, strict=True):
            if not len(x_TI):  # an expert that none of the sample's tokens went to
                continue
            if x_TI.is_cuda:
                self._fold(slice(None), _product(x_TI, dy_TO), scale)
            else:
                self._fold_tiles(x_TI.float(), dy_TO.float(), scale)

    def _add_each(self, of: str, values: Sequence[Tensor], scale: float = 1.0) -> None:
        """Add each sample's values, (T, I) or (T, O)."""
        for value in values if self._of[of] else ():
            if len(value):
                self._add(of, value.float() if scale == 1.0 else value.float() / scale)

    def _fold_tiles(self, x_TI: Tensor, dy_TO: Tensor, scale: float) -> None:
        num_rows = max(32, _TILE_BYTES // (4 * x_TI.shape[1]))
        for start in range(0, dy_TO.shape[1], num_rows):
            rows = slice(start, start + num_rows)
            self._fold(rows, dy_TO[:, rows].T @ x_TI, scale)

    def _fold(self, rows: slice, g_OI: Tensor, scale: float) -> None:
        """Add rows of one sample's gradient to the sums; `g_OI` is used up."""
        if scale != 1.0:
            g_OI /= scale
        self._add(WEIGHT_GRADIENTS, g_OI, rows)

    def _add(self, of: str, values: Tensor, rows: slice | None = None) -> None:
        for statistic in self._of[of]:
            sums = self.sums[statistic.name]
            statistic.add(sums[rows] if rows and statistic.has_rows else sums, values)

    def clear(self) -> None:
        """Start from nothing."""
        for sums in self.sums.values():
            sums.zero_()
        self.num_samples = self.num_tokens = 0

    def free(self) -> None:
        """Let go of the sums' memory."""
        self.sums.clear()

    def restore(self, stats: LayerStats) -> None:
        """Go on from sums that `result` gave before."""
        for name, sums in self.sums.items():
            values = stats.arrays[name]
            is_packed = STATISTICS[name].is_symmetric
            sums.copy_(torch.from_numpy(square(values) if is_packed else values))
        self.num_samples, self.num_tokens = stats.num_samples, stats.num_tokens

    def result(self) -> LayerStats:
        """The sums on the host; GradpipeError if the layer never ran or a sum is not finite."""
        if not self.num_samples:
            raise GradpipeError(
                f"layer {self.spec.name} never ran: name the blocks with --blocks; a model that "
                "leaves some of their layers out is not supported"
            )
        for name, sums in self.sums.items():
            if not bool(torch.isfinite(sums).all()):
                raise GradpipeError(
                    f"layer {self.spec.name}: {name} is NaN or infinite: the model overflows in "
                    "this dtype; try --dtype bfloat16 or float32"
                )
        arrays = {name: _on_host(STATISTICS[name], sums) for name, sums in self.sums.items()}
        return LayerStats(arrays=arrays, num_samples=self.num_samples, num_tokens=self.num_tokens)


def _on_host(statistic: Statistic, sums: Tensor) -> Sums:
    return np.asarray((_packed(sums) if statistic.is_symmetric else sums).cpu().numpy())


def _packed(matrix_NN: Tensor) -> Tensor:
    """The upper triangle, row by row."""
    return torch.cat([row[i:] for i, row in enumerate(matrix_NN)])


def _product(x_TI: Tensor, dy_TO: Tensor) -> Tensor:
    """dYᵀX on CUDA, summed and returned in float32 even where the factors are 16-bit."""
    if x_TI.dtype is torch.float32:
        return dy_TO.T @ x_TI
    return torch.mm(dy_TO.T.to(x_TI.dtype), x_TI, out_dtype=torch.float32)
