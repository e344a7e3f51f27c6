"""What a pruned layer is told by: masks as pictures, scores by what became of them, errors.

Shapes: O out, I in, N either; G groups of N scores; R, C cells of a picture.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradpipe.stages.prune.target import Group

_BINS = 60
_PERCENTILES = (5.0, 50.0, 95.0)


def shrunk(mask_OI: Tensor, most: int) -> Tensor:
    """The share of True in each of at most `most` x `most` cells, float32 (R, C).

    Cells are equal but for rounding: rows i·O/R to (i+1)·O/R.
    """
    sums = mask_OI.cpu().numpy()
    for axis in (0, 1):
        size = sums.shape[axis]
        edges = np.arange(min(size, most) + 1) * size // min(size, most)
        totals = np.add.reduceat(sums, edges[:-1], axis, dtype=np.float32)
        sums = totals / np.expand_dims(np.diff(edges), 1 - axis).astype(np.float32)
    return torch.from_numpy(sums)


def histogram(score_OI: Tensor, kept_OI: Tensor) -> tuple[npt.NDArray[Any], ...]:
    """Edges of bins of log₁₀ of scores, and how many of what was kept and was pruned are in each.

    Scores of 0 are in none.
    """
    scores, kept = score_OI.double().flatten().cpu().numpy(), kept_OI.flatten().cpu().numpy()
    positive = scores > 0
    logs = np.log10(scores[positive])
    edges = np.histogram_bin_edges(logs, _BINS) if len(logs) else np.array([0.0, 1.0])
    parts = [np.histogram(logs[kept[positive] == x], edges)[0] for x in (True, False)]
    return edges.astype(np.float32), *parts


def cuts(score_OI: Tensor, pruned_share: float, group: Group) -> tuple[float, float, float]:
    """Where the groups' thresholds lie, log₁₀: percentiles 5, 50 and 95 over all groups.

    The threshold of a group is the highest score among the share that goes.
    """
    lines = score_OI.T if group.axis == 1 else score_OI
    size = len(lines) if group.axis is None else group.size
    count = len(lines) // size
    head, tail = lines[: count * size], lines[count * size :]
    groups = (head.reshape(count, size * lines.shape[1]), tail.reshape(1, -1))
    found = []
    for scores_GN in (some for some in groups if some.numel()):  # the last one may be smaller
        rank = max(1, round(pruned_share * scores_GN.shape[1]))
        found.append(scores_GN.kthvalue(rank, dim=1).values.double().cpu())
    logs = np.log10(np.maximum(torch.cat(found).numpy(), np.finfo(np.float32).tiny))
    low, middle, high = np.percentile(logs, _PERCENTILES)
    return float(low), float(middle), float(high)


def relative_error(weight_OI: Tensor, pruned_OI: Tensor, moment: Tensor) -> float:
    """‖(W − Ŵ) Xᵀ‖ / ‖W Xᵀ‖, by Σxxᵀ (I, I); by √Σx² (I,) as if inputs were uncorrelated."""
    change_OI = weight_OI.float() - pruned_OI.float()
    moved, whole = (_energy(x, moment) for x in (change_OI, weight_OI.float()))
    return float((moved / whole).clamp_min(0).sqrt()) if whole > 0 else 0.0


def _energy(matrix_OI: Tensor, moment: Tensor) -> Tensor:
    if moment.ndim == 1:
        return (matrix_OI * moment).square().sum(dtype=torch.float64)
    return ((matrix_OI @ moment) * matrix_OI).sum(dtype=torch.float64)
