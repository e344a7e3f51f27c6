"""Perplexity by the protocol of GPTQ, Wanda and GBLM-Pruner.

exp of the mean, over windows that do not overlap, of each window's mean token loss.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gradpipe.errors import GradpipeError
from gradpipe.stages.model.batch import Batch


class MeanLoss:
    """The mean of the windows' losses, as far as they are added."""

    def __init__(self, num_windows: int) -> None:
        self._num_windows = num_windows
        self._total = 0.0
        self._done = 0

    def add(self, batch_loss: Any, size: int) -> None:
        """The mean loss of the next `size` windows; GradpipeError if it is not finite."""
        loss = float(batch_loss)
        if not math.isfinite(loss):
            raise GradpipeError(
                f"the model's loss is {loss} on window {self._done + 1} of {self._num_windows}: "
                "try --dtype bfloat16 or float32, or mend the checkpoint"
            )
        self._total += loss * size
        self._done += size

    @property
    def perplexity(self) -> float:
        """Of the mean; infinite where it is beyond a float."""
        mean = self._total / self._num_windows
        return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def perplexity(
    model: Any,
    windows: npt.NDArray[np.int64],
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> float:
    """Perplexity of `model` on `windows` (windows, tokens); `advance` hears of windows done.

    Infinite where it is beyond a float. Raises GradpipeError for a loss that is not finite.
    """
    mean = MeanLoss(len(windows))
    for batch in Batch.of_tokens(torch.from_numpy(windows)).split(batch_size):
        mean.add(batch.to(model.device).forward(model).loss, len(batch))
        advance(len(batch))
    return mean.perplexity
