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
from torch.nn.functional import cross_entropy, silu
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
    "mixtral": "model.layers",
    "qwen3_moe": "model.layers",
}

# model_type -> names of an expert's gate, up and down matrix in the checkpoint, and of their parent
EXPERT_NAMES: Mapping[str, tuple[tuple[str, str, str], str]] = {
    "mixtral": (("w1", "w3", "w2"), "block_sparse_moe"),
    "qwen3_moe": (("gate_proj", "up_proj", "down_proj"), "mlp"),
}


# ---- statistics ----


def block_linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every Linear and Conv1D inside the repeated blocks, by module path, in the model's order."""
    prefix = BLOCK_PATHS[model.config.model_type] + "."
    _, parent = EXPERT_NAMES.get(model.config.model_type, ((), "mlp"))
    return {
        name.replace(".mlp.experts.", f".{parent}.experts."): module
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, nn.Linear | Conv1D)
    }


class PlainExperts(nn.Module):
    """A mixture of experts token by token, each expert three linear maps of its own."""

    def __init__(self, fused: nn.Module, names: tuple[str, str, str]) -> None:
        """Take the weights of a model's fused experts: (E, 2I, H) and (E, H, I)."""
        super().__init__()
        gate_up, down = fused.get_parameter("gate_up_proj"), fused.get_parameter("down_proj")
        self.names = names
        for index in range(len(down)):
            gate, up = gate_up[index].detach().chunk(2)
            weights = dict(zip(names, (gate, up, down[index].detach()), strict=True))
            self.add_module(str(index), nn.ModuleDict({n: linear(w) for n, w in weights.items()}))

    def forward(self, tokens: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        """Give each token (T, H) the sum of its experts' answers by their shares, both (T, K)."""
        return torch.stack([self._one(*each) for each in zip(tokens, experts, shares, strict=True)])

    def _one(self, token: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        total = torch.zeros_like(token)
        for index, share in zip(experts.tolist(), shares, strict=True):
            gate, up, down = (self.get_submodule(f"{index}.{name}") for name in self.names)
            total = total + share * down(silu(gate(token)) * up(token))
        return total


def linear(weight: Tensor) -> nn.Linear:
    """Make a linear map without bias of a weight (out, in)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.clone())
    return layer


def with_plain_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Put `PlainExperts` in place of a model's fused ones; other models stay as they are."""
    if model.config.model_type in EXPERT_NAMES:
        names, _ = EXPERT_NAMES[model.config.model_type]
        for name, module in list(model.named_modules()):
            if name.endswith(".mlp.experts") and not isinstance(module, PlainExperts):
                parent = model.get_submodule(name.removesuffix(".experts"))
                parent.experts = PlainExperts(module, names)
    return model


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

    model = with_plain_experts(model)
    return layer_statistics(block_linears(model), own_loss, [ids[None] for ids in input_ids])


def layer_statistics(
    layers: Mapping[str, nn.Module], loss_of: Callable[[Tensor], Tensor], samples: Sequence[Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Sum over samples, in float64: grad_l1, grad_l2, grad_sum (out, in); act_l2, act_sum (in,);
    hessian (in, in) and grad_cov (out, out), here as whole matrices.
    """  # noqa: D205
    totals: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for sample in samples:
        inputs, gradients = _backward(layers, loss_of, sample)
        for name, layer in layers.items():
            terms = _one_sample(_gradient(layer), inputs[name], gradients[name])
            for statistic, value in terms.items():
                totals[name][statistic] = totals[name].get(statistic, 0) + value
    return totals


def _backward(
    layers: Mapping[str, nn.Module], loss_of: Callable[[Tensor], Tensor], sample: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Leave this sample's gradient in each weight's `.grad`.

    Returns the inputs (T, in) seen, and the gradients (T, out) of what came out; T is 0 and the
    gradient zero for an expert that no token went to.
    """
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    outputs: dict[str, list[Tensor]] = defaultdict(list)
    handles = []
    for name, layer in layers.items():
        _weight(layer).requires_grad_(True)  # noqa: FBT003 - torch's own signature
        _weight(layer).grad = torch.zeros_like(_weight(layer))

        def record(_layer: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            inputs[name].append(args[0].detach().reshape(-1, args[0].shape[-1]))

        def keep(
            _layer: nn.Module, _args: tuple[Tensor, ...], output: Tensor, name: str = name
        ) -> None:
            output.retain_grad()
            outputs[name].append(output)

        handles.append(layer.register_forward_pre_hook(record))
        handles.append(layer.register_forward_hook(keep))
    loss_of(sample).backward()
    for handle in handles:
        handle.remove()
    gradients = {
        name: torch.cat([_nothing(layer, 0), *(_grad_of(output) for output in outputs[name])])
        for name, layer in layers.items()
    }
    return {
        name: torch.cat([_nothing(layer, 1), *inputs[name]]) for name, layer in layers.items()
    }, gradients


def _nothing(layer: nn.Module, side: int) -> Tensor:
    """Give no rows, of the layer's output width (side 0) or input width (side 1)."""
    weight = oriented(layer, _weight(layer))
    return weight.new_empty(0, weight.shape[side])


def _grad_of(output: Tensor) -> Tensor:
    assert output.grad is not None
    return output.grad.reshape(-1, output.shape[-1])


def _one_sample(gradient: Tensor, inputs: Tensor, output_gradients: Tensor) -> dict[str, Tensor]:
    """Give one sample's terms from its gradient (out, in), inputs (T, in) and the outputs' own."""
    g, x, dy = gradient.double(), inputs.double(), output_gradients.double()
    return {
        "grad_l1": g.abs(),
        "grad_l2": g.square(),
        "grad_sum": g,
        "act_l2": x.square().sum(dim=0),
        "act_sum": x.sum(dim=0),
        "hessian": x.T @ x,
        "grad_cov": dy.T @ dy,
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
    if method == "fisher":
        return magnitude.square() * gradient_norm(stats, num_samples, "l2").square()
    if method in {"ria", "gradient-ria"}:
        norm = input_norm(stats, num_samples)
        if method == "gradient-ria":
            norm = norm + alpha * gradient_norm(stats, num_samples, grad_norm)
        return _relative_importance(magnitude) * norm.sqrt()
    raise ValueError(f"unknown method {method!r}")


def _relative_importance(magnitude: Tensor) -> Tensor:
    """Give each weight's share of its row plus its share of its column, one by one."""
    rows, columns = magnitude.shape
    importance = torch.zeros_like(magnitude)
    for i in range(rows):
        for j in range(columns):
            value = magnitude[i, j]
            importance[i, j] = value / magnitude[i].sum() + value / magnitude[:, j].sum()
    return importance


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


# ---- allocations ----


def reference_owl(
    scores: Mapping[str, Tensor], sparsity: float, lam: float = 0.08, m: float = 5.0
) -> dict[str, float]:
    """OWL's sparsity of each block from all of its scores, for blocks that need no clipping."""
    outliers = {k: float((x > m * x.double().mean()).double().mean()) for k, x in scores.items()}
    low, high = min(outliers.values()), max(outliers.values())
    keep = {k: 2 * lam * (x - low) / (high - low) for k, x in outliers.items()}
    return _around(keep, scores, sparsity)


def reference_dlp(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """DLP's sparsity of each block, for blocks that need no clipping; at 50, 60 or 70 %."""
    alpha = {0.5: 0.04, 0.6: 0.1, 0.7: 0.15}[sparsity]  # its scripts give no others
    medians = {k: sorted(x.tolist())[(len(x) - 1) // 2] for k, x in scores.items()}
    importance = {k: 1 - x / sum(medians.values()) for k, x in medians.items()}
    low, high = min(importance.values()), max(importance.values())
    keep = {k: 2 * alpha * (x - low) / (high - low) for k, x in importance.items()}
    return _around(keep, scores, sparsity)


def _around(
    keep: Mapping[str, float], scores: Mapping[str, Tensor], sparsity: float
) -> dict[str, float]:
    """Shift what is kept so that the mean, weighted by size, is 1 - sparsity."""
    total = sum(x.numel() for x in scores.values())
    mean = sum(keep[k] * scores[k].numel() for k in keep) / total
    return {k: 1 - (x - mean + 1 - sparsity) for k, x in keep.items()}


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
