"""Scores: how much each weight matters. Low scores go first.

Weights come in any float dtype; scores are float32. Shapes: O out, I in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradpipe.errors import GradpipeError
from gradpipe.stages.prune.methods import Score
from gradpipe.stages.prune.statistics import LayerStatistics

_CHUNK_VALUES = 1 << 20  # of a layer, scored at a time: they stay in a CPU's cache


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
