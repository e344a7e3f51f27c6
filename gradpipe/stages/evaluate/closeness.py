"""How close a model's predictions are to the dense model's, token by token.

Perplexity is one mean over a text: models that err on different tokens may share it. The divergence
is Σ p ln(p/q) with p the dense model's distribution of the next token and q the other's, in nats,
averaged over tokens; the agreement is the share of tokens for which both rank the same one first.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gradpipe.errors import InputError
from gradpipe.stages.evaluate.perplexity import MeanLoss
from gradpipe.stages.model.batch import Batch

_ROWS = 256  # tokens looked at together: a vocabulary's width in float32, five times


@dataclass(frozen=True, slots=True, kw_only=True)
class Closeness:
    """Two models on one text."""

    perplexity: float
    dense_perplexity: float
    difference_error: float | None  # standard error of the difference; None for a single window
    kl_divergence: float  # nats a token
    agreement: float  # 0 to 1


@torch.no_grad()
def closeness(
    model: Any,
    dense: Any,
    windows: npt.NDArray[np.int64],
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Closeness:
    """Both models on `windows` (windows, tokens); both perplexities are those that each has alone.

    Raises InputError if their vocabularies differ, GradpipeError for a loss that is not finite.
    """
    means, sums = (MeanLoss(len(windows)), MeanLoss(len(windows))), _Sums()
    for batch in Batch.of_tokens(torch.from_numpy(windows)).split(batch_size):
        outputs = [batch.to(one.device).forward(one) for one in (model, dense)]
        for mean, output in zip(means, outputs, strict=True):
            mean.add(output.loss, len(batch))
        logits, theirs = (x.logits.to(model.device) for x in outputs)
        if logits.shape != theirs.shape:
            raise InputError(
                f"--compare: logits of {theirs.shape[-1]} tokens, the model's of "
                f"{logits.shape[-1]}: give the dense model that it was made from"
            )
        for sample, other, ids in zip(logits, theirs, batch.inputs["input_ids"], strict=True):
            sums.add(sample[:-1], other[:-1], ids[1:].to(model.device))
        advance(len(batch))
    ours, dense_mean = (mean.perplexity for mean in means)
    return Closeness(
        perplexity=ours,
        dense_perplexity=dense_mean,
        difference_error=_difference_error(np.array(sums.losses), ours, dense_mean),
        kl_divergence=sums.divergence / sums.tokens,
        agreement=sums.agreeing / sums.tokens,
    )


@dataclass(slots=True)
class _Sums:
    """Over the tokens so far."""

    tokens: int = 0
    agreeing: int = 0
    divergence: float = 0.0
    losses: list[tuple[float, float]] = field(default_factory=list)  # of each window

    def add(self, logits_TV: Tensor, dense_TV: Tensor, next_T: Tensor) -> None:
        """One window: each token's logits, and the token that came next."""
        pair = [0.0, 0.0]
        for start in range(0, len(next_T), _ROWS):
            part, wanted = slice(start, start + _ROWS), next_T[start : start + _ROWS]
            q, p = (x[part].float().log_softmax(-1) for x in (logits_TV, dense_TV))
            terms = torch.where(p > -math.inf, p.exp() * (p - q), 0.0)
            self.divergence += float(terms.sum(dtype=torch.float64))
            self.agreeing += int((q.argmax(-1) == p.argmax(-1)).sum())
            for index, x in enumerate((q, p)):
                pair[index] += float(cross_entropy(x, wanted, reduction="sum"))
        self.tokens += len(next_T)
        self.losses.append((pair[0] / len(next_T), pair[1] / len(next_T)))


def _difference_error(
    losses_W2: npt.NDArray[np.float64], perplexity: float, dense: float
) -> float | None:
    """The standard error of the difference of two perplexities over the same windows.

    By the delta method: a perplexity moves by itself times what its mean loss moves, and windows
    are pairs, hard for both models or easy for both.
    """
    count = len(losses_W2)
    if count < 2 or not math.isfinite(perplexity * dense):
        return None
    moves_W = perplexity * losses_W2[:, 0] - dense * losses_W2[:, 1]
    return float(moves_W.std(ddof=1) / math.sqrt(count))
