"""What gradpipe computes, written again in the plainest way that can be read at a glance.

One sample at a time, ordinary `.backward()` on weights that require a gradient, Python loops and
`sorted()`; slow on purpose, and independent: it imports nothing of the package under test.
Scores follow Wanda (Sun et al. 2023) and GBLM-Pruner (Das et al. 2023); a store's sums are scaled
so that alpha keeps the paper's meaning (N = 128) at any number of samples.

Shapes: N samples, T tokens of one sample, a weight is always (out, in).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

PAPER_SAMPLES = 128  # the number of samples at which alpha was tuned

# model_type -> the module list of repeated blocks
BLOCK_PATHS: Mapping[str, str] = {
    "llama": "model.layers",
    "mistral": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
    "gemma3_text": "model.layers",
    "phi3": "model.layers",
    "opt": "model.decoder.layers",
    "bloom": "transformer.h",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "falcon": "transformer.h",
}


# ---- statistics ----


def block_linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every Linear and Conv1D inside the repeated blocks, by module path, in the model's order."""
    prefix = BLOCK_PATHS[model.config.model_type] + "."
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, nn.Linear | Conv1D)
    }


def oriented(layer: nn.Module, matrix: Tensor) -> Tensor:
    """Give a weight, or its gradient, as (out, in); Conv1D keeps its own as (in, out)."""
    return matrix.T if isinstance(layer, Conv1D) else matrix


def reference_statistics(model: PreTrainedModel, input_ids: Tensor) -> dict[str, dict[str, Tensor]]:
    """Sum the five statistics of every prunable layer over the samples `input_ids` (N, T).

    The loss is the model's own: the mean over the T - 1 predicted tokens of one sample.
    """

    def own_loss(sample: Tensor) -> Tensor:  # (1, T) -> ()
        loss = model(input_ids=sample, labels=sample, use_cache=False).loss
        assert isinstance(loss, Tensor)
        return loss

    return layer_statistics(block_linears(model), own_loss, [ids[None] for ids in input_ids])


def layer_statistics(
    layers: Mapping[str, nn.Module], loss_of: Callable[[Tensor], Tensor], samples: Sequence[Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Sum over samples, in float64: grad_l1, grad_l2, grad_sum (out, in); act_l2, act_sum (in,)."""
    totals: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for sample in samples:
        inputs = _backward(layers, loss_of, sample)
        for name, layer in layers.items():
            for statistic, value in _one_sample(_gradient(layer), inputs[name]).items():
                totals[name][statistic] = totals[name].get(statistic, 0) + value
    return totals


def _backward(
    layers: Mapping[str, nn.Module], loss_of: Callable[[Tensor], Tensor], sample: Tensor
) -> dict[str, Tensor]:
    """Leave this sample's gradient in each weight's `.grad`; return the inputs (T, in) seen."""
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    handles = []
    for name, layer in layers.items():
        _weight(layer).requires_grad_(True)  # noqa: FBT003 - torch's own signature
        _weight(layer).grad = None

        def record(_layer: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            inputs[name].append(args[0].detach().reshape(-1, args[0].shape[-1]))

        handles.append(layer.register_forward_pre_hook(record))
    loss_of(sample).backward()
    for handle in handles:
        handle.remove()
    return {name: torch.cat(seen) for name, seen in inputs.items()}


def _one_sample(gradient: Tensor, inputs: Tensor) -> dict[str, Tensor]:
    """Give the terms of one sample from its gradient (out, in) and its inputs (T, in)."""
    g, x = gradient.double(), inputs.double()
    return {
        "grad_l1": g.abs(),
        "grad_l2": g.square(),
        "grad_sum": g,
        "act_l2": x.square().sum(dim=0),
        "act_sum": x.sum(dim=0),
    }


def _weight(layer: nn.Module) -> nn.Parameter:
    """Give the layer's weight parameter, as it is stored."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _gradient(layer: nn.Module) -> Tensor:
    """Give a copy (out, in) of the weight's gradient."""
    gradient = _weight(layer).grad
    assert gradient is not None
    return oriented(layer, gradient).clone()


# ---- scores ----


def reference_score(
    method: str,
    weight: Tensor,
    stats: Mapping[str, Tensor],
    num_samples: int,
    alpha: float = 100.0,
    grad_norm: str = "l1",
) -> Tensor:
    """Score a weight (out, in) in float64 from this layer's sums over `num_samples` samples."""
    magnitude = weight.double().abs()  # (out, in)
    if method == "magnitude":
        return magnitude
    if method == "wanda":
        return magnitude * input_norm(stats, num_samples)
    if method == "gradient":
        return magnitude * gradient_norm(stats, num_samples, grad_norm)
    if method == "gblm":
        gradient = gradient_norm(stats, num_samples, grad_norm)
        return magnitude * (alpha * gradient + input_norm(stats, num_samples))
    raise ValueError(f"unknown method {method!r}: expected magnitude, wanda, gradient or gblm")


def input_norm(stats: Mapping[str, Tensor], num_samples: int) -> Tensor:
    """Give the norm of each input feature (in,): the root of its squares' sum per sample."""
    return (stats["act_l2"].double() / num_samples).sqrt()


def gradient_norm(stats: Mapping[str, Tensor], num_samples: int, grad_norm: str) -> Tensor:
    """Give the gradient norm (out, in), scaled to the paper's 128 samples."""
    scale = PAPER_SAMPLES / num_samples
    if grad_norm == "l1":
        return scale * stats["grad_l1"].double()
    if grad_norm == "l2":
        return (scale * stats["grad_l2"].double()).sqrt()
    if grad_norm == "sum":
        return (scale * stats["grad_sum"].double()).abs()
    raise ValueError(f"unknown grad_norm {grad_norm!r}: expected l1, l2 or sum")


# ---- masks ----


def reference_mask(score: Tensor, sparsity: float, group: str) -> Tensor:
    """Prune the floor(sparsity * size) lowest scores of each group, ties at the lower index first.

    `sparsity` counts as the decimal it is printed as: 0.29 of 100 is 29. The mask is (out, in).
    """
    rows, columns = score.shape
    values = score.flatten().tolist()
    kept = [True] * len(values)
    for members in group_members(rows, columns, group):
        num_pruned = math.floor(Fraction(str(sparsity)) * len(members))
        for index in _lowest(values, members, num_pruned):
            kept[index] = False
    return torch.tensor(kept).reshape(rows, columns)


def reference_nm_mask(score: Tensor, n: int, m: int) -> Tensor:
    """Keep the n highest of every m consecutive inputs; of equals, the lower index goes first."""
    rows, columns = score.shape
    if columns % m:
        raise ValueError(f"{n}:{m} needs an input width divisible by {m}, got {columns}")
    values = score.flatten().tolist()
    kept = [True] * len(values)
    for start in range(0, rows * columns, m):
        for index in _lowest(values, range(start, start + m), m - n):
            kept[index] = False
    return torch.tensor(kept).reshape(rows, columns)


def group_members(rows: int, columns: int, group: str) -> Iterator[list[int]]:
    """Yield the flat row-major indices of each group: output, input, layer, output:k or input:k."""
    kind, _, count = group.partition(":")
    if kind == "layer" and not count:
        yield list(range(rows * columns))
    elif kind == "output":
        size = int(count or 1)
        for first in range(0, rows, size):
            chosen_rows = range(first, min(first + size, rows))
            yield [row * columns + column for row in chosen_rows for column in range(columns)]
    elif kind == "input":
        size = int(count or 1)
        for first in range(0, columns, size):
            chosen_columns = range(first, min(first + size, columns))
            yield [row * columns + column for row in range(rows) for column in chosen_columns]
    else:
        raise ValueError(f"unknown group {group!r}: expected output, input, layer or kind:k")


def _lowest(values: Sequence[float], members: Sequence[int], count: int) -> list[int]:
    """Give the `count` members of lowest value, the lower index first among equals."""
    return sorted(members, key=lambda index: (values[index], index))[:count]


# ---- evaluation ----


@torch.no_grad()
def reference_perplexity(model: PreTrainedModel, input_ids_stream: Tensor, seq_len: int) -> float:
    """Give exp(mean over windows of the mean token loss), the losses in float64.

    The stream (tokens,) is cut into non-overlapping windows of `seq_len`; a short tail is dropped.
    """
    stream = input_ids_stream.flatten()
    losses = []
    for start in range(0, len(stream) - seq_len + 1, seq_len):
        window = stream[start : start + seq_len]  # (T,)
        logits = model(input_ids=window[None], use_cache=False).logits[0]  # (T, vocab)
        losses.append(cross_entropy(logits[:-1].double(), window[1:]).item())
    if not losses:
        raise ValueError(f"a stream of {len(stream)} tokens has no full window of {seq_len}")
    return math.exp(sum(losses) / len(losses))
