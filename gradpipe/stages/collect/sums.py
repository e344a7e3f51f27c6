"""Accumulators: float32 sums over calibration samples, one set per layer.

The per-sample gradient of a linear map Y = X Wᵀ is G_b = dY_bᵀ X_b, the same products as the
ordinary weight gradient, kept apart by sample. Norms over samples (GBLM-Pruner, eq. 3-4) need
Σ_b|G_b| and Σ_b G_b², which no sum of gradients can give back.

Shapes: T tokens of one sample (for an expert, those routed to it), I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradpipe.errors import GradpipeError
from gradpipe.store.codec import triangle_rows
from gradpipe.store.schema import LayerSpec
from gradpipe.store.statistics import GRADIENT_STATISTICS, SECOND_MOMENTS, needs_backward
from gradpipe.store.writer import LayerStats

_TILE_BYTES = 2 << 20  # a tile of G stays in the CPU's cache while it is folded into the sums


class LayerAccumulator:
    """The sums of one layer."""

    def __init__(self, spec: LayerSpec, statistics: tuple[str, ...], device: torch.device) -> None:
        """Zeroed float32 sums on `device`."""
        self.spec = spec
        self.sums = {
            name: torch.zeros(_sum_shape(spec, name), dtype=torch.float32, device=device)
            for name in spec.own(statistics)
        }
        self.num_samples = 0
        self.num_tokens = 0

    @property
    def needs_gradients(self) -> bool:
        """True if any statistic needs a backward pass."""
        return needs_backward(self.sums)

    def add_inputs(self, xs_TI: Sequence[Tensor]) -> None:
        """Count a batch, and add each sample's inputs to the activation sums."""
        self.num_samples += len(xs_TI)
        for x_TI in xs_TI:
            self.num_tokens += len(x_TI)
            if "act_l2" in self.sums:
                self.sums["act_l2"] += x_TI.float().square().sum(dim=0)
            if "act_sum" in self.sums:
                self.sums["act_sum"] += x_TI.float().sum(dim=0)
            if "hessian" in self.sums:
                _add_moment(self.sums["hessian"], x_TI.float())

    def add_gradients(
        self, xs_TI: Sequence[Tensor], dys_TO: Sequence[Tensor], scale: float
    ) -> None:
        """Add each sample's gradient; `scale` is what the loss was multiplied by."""
        needs_norms = not self.sums.keys().isdisjoint(GRADIENT_STATISTICS)
        for x_TI, dy_TO in zip(xs_TI, dys_TO, strict=True):
            if "grad_cov" in self.sums:
                _add_moment(self.sums["grad_cov"], dy_TO.float() / scale)
            if not needs_norms or not len(x_TI):  # an expert that none of its tokens went to
                continue
            if x_TI.is_cuda:
                self._fold(slice(None), _product(x_TI, dy_TO), scale)
            else:
                self._fold_tiles(x_TI.float(), dy_TO.float(), scale)

    def _fold_tiles(self, x_TI: Tensor, dy_TO: Tensor, scale: float) -> None:
        num_rows = max(32, _TILE_BYTES // (4 * x_TI.shape[1]))
        for start in range(0, dy_TO.shape[1], num_rows):
            rows = slice(start, start + num_rows)
            self._fold(rows, dy_TO[:, rows].T @ x_TI, scale)

    def _fold(self, rows: slice, g_OI: Tensor, scale: float) -> None:
        """Add rows of one sample's gradient to the sums; `g_OI` is used up."""
        if scale != 1.0:
            g_OI /= scale
        if "grad_sum" in self.sums:
            self.sums["grad_sum"][rows] += g_OI
        if "grad_l2" in self.sums:
            self.sums["grad_l2"][rows].addcmul_(g_OI, g_OI)
        if "grad_l1" in self.sums:
            self.sums["grad_l1"][rows] += g_OI.abs_()

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
            values = torch.from_numpy(stats.arrays[name])
            sums.copy_(_unpacked(values, len(sums)) if name in SECOND_MOMENTS else values)
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
        arrays = {
            name: np.asarray((_packed(sums) if name in SECOND_MOMENTS else sums).cpu().numpy())
            for name, sums in self.sums.items()
        }
        return LayerStats(arrays=arrays, num_samples=self.num_samples, num_tokens=self.num_tokens)


def _sum_shape(spec: LayerSpec, statistic: str) -> tuple[int, ...]:
    """The shape that is summed in: second moments as whole matrices, packed only at the end."""
    if statistic in SECOND_MOMENTS:
        return (spec.width(statistic),) * 2
    return spec.statistic_shape(statistic)


def _add_moment(sums_NN: Tensor, values_TN: Tensor) -> None:
    """Add Σ v vᵀ over tokens."""
    sums_NN.addmm_(values_TN.T, values_TN)


def _packed(matrix_NN: Tensor) -> Tensor:
    """The upper triangle, row by row."""
    return torch.cat([row[i:] for i, row in enumerate(matrix_NN)])


def _unpacked(packed: Tensor, width: int) -> Tensor:
    """A matrix with this upper triangle: the lower one is never read."""
    matrix_NN = torch.zeros(width, width)
    for i, row in enumerate(triangle_rows(width)):
        matrix_NN[i, i:] = packed[row]
    return matrix_NN


def _product(x_TI: Tensor, dy_TO: Tensor) -> Tensor:
    """dYᵀX on CUDA, summed and returned in float32 even where the factors are 16-bit."""
    if x_TI.dtype is torch.float32:
        return dy_TO.T @ x_TI
    return torch.mm(dy_TO.T.to(x_TI.dtype), x_TI, out_dtype=torch.float32)
