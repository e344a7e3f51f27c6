"""Perplexity by the protocol of GPTQ, Wanda and GBLM-Pruner.

exp of the mean, over windows that do not overlap, of each window's mean token loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gradpipe.errors import GradpipeError
from gradpipe.stages.model.batch import Batch


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
    total, done = 0.0, 0
    for batch in Batch.of_tokens(torch.from_numpy(windows)).split(batch_size):
        loss = float(batch.to(model.device).forward(model).loss)
        if not math.isfinite(loss):
            raise GradpipeError(
                f"the model's loss is {loss} on window {done + 1} of {len(windows)}: try --dtype "
                "bfloat16 or float32, or mend the checkpoint"
            )
        total += loss * len(batch)
        done += len(batch)
        advance(len(batch))
    mean = total / len(windows)
    return math.exp(mean) if mean < 700 else math.inf
