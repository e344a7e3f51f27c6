"""The reference and the tiny models against cases small enough to be worked out by hand."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from tests.support.models import SLIDING_WINDOW, VOCAB_SIZE, random_ids, tiny_model
from tests.support.reference import (
    block_linears,
    layer_statistics,
    oriented,
    reference_mask,
    reference_nm_mask,
    reference_perplexity,
    reference_score,
    reference_statistics,
)

STEP = 1e-5


def finite_difference(loss: Callable[[], Tensor], weight: Tensor, index: tuple[int, int]) -> float:
    """Give the slope of `loss` in one entry of `weight` by a central difference."""
    with torch.no_grad():
        weight[index] += STEP
        above = loss().item()
        weight[index] -= 2 * STEP
        below = loss().item()
        weight[index] += STEP
    return (above - below) / (2 * STEP)


# ---- masks ----


def bits(*rows: str) -> Tensor:
    """Read a mask from rows of 1 (kept) and 0 (pruned)."""
    return torch.tensor([[bit == "1" for bit in row] for row in rows])


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("output", bits("1100", "0011", "0011")),
        ("input", bits("1100", "1111", "0011")),
        ("layer", bits("1100", "1011", "0001")),
        ("output:2", bits("1100", "0011", "0011")),
        ("input:3", bits("1100", "1011", "0011")),
    ],
)
def test_mask_prunes_the_lowest_of_each_group(group: str, expected: Tensor) -> None:
    """Each group loses floor(size / 2) of its lowest scores; the last may be smaller."""
    rows = [[9.0, 8.0, 1.0, 0.0], [4.0, 3.0, 5.0, 7.0], [0.5, 2.0, 3.5, 6.0]]
    assert torch.equal(reference_mask(torch.tensor(rows), 0.5, group), expected)


def test_mask_breaks_ties_at_the_lower_index() -> None:
    """Of equal scores the first in row-major order goes first, in every group."""
    score = torch.ones(2, 4)
    assert torch.equal(reference_mask(score, 0.5, "output"), bits("0011", "0011"))
    assert torch.equal(reference_mask(score, 0.5, "input"), bits("0000", "1111"))
    assert torch.equal(reference_mask(score, 0.25, "layer"), bits("0011", "1111"))
    assert torch.equal(reference_mask(score, 0.75, "input:2"), bits("0000", "0101"))


def test_mask_counts_on_the_exact_decimal() -> None:
    """0.29 of 100 prunes 29, although 0.29 * 100 rounds below 29 in binary."""
    assert int(0.29 * 100) == 28
    assert reference_mask(torch.rand(3, 100), 0.29, "output").sum(dim=1).tolist() == [71] * 3


def test_nm_mask_keeps_n_of_each_m_inputs() -> None:
    """n:4 keeps the n highest of four inputs; ties lose the lower index."""
    score = torch.tensor([[4, 3, 2, 1, 1, 1, 1, 1], [5, 6, 5, 5, 0, 2, 0, 1]]).float()
    assert torch.equal(reference_nm_mask(score, 2, 4), bits("11000011", "01010101"))
    assert torch.equal(reference_nm_mask(score, 1, 4), bits("10000001", "01000100"))


def test_masks_refuse_what_they_cannot_group() -> None:
    """An unknown group and a ragged n:m width are errors, not silent dense masks."""
    with pytest.raises(ValueError, match="unknown group 'row'"):
        reference_mask(torch.ones(1, 4), 0.5, "row")
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        reference_nm_mask(torch.ones(1, 6), 2, 4)


# ---- scores ----


@pytest.mark.parametrize(
    ("method", "grad_norm", "expected"),
    [
        ("magnitude", "l1", [[2.0, 3.0]]),
        ("wanda", "l1", [[2.0 * 3, 3.0 * 1]]),
        ("gradient", "l1", [[2.0 * 64, 3.0 * 32]]),
        ("gradient", "l2", [[2.0 * 8, 3.0 * 16]]),
        ("gradient", "sum", [[2.0 * 32, 3.0 * 0]]),
        ("gblm", "l1", [[2.0 * (640 + 3), 3.0 * (320 + 1)]]),
    ],
)
def test_scores_by_hand(method: str, grad_norm: str, expected: list[list[float]]) -> None:
    """With the sums of 4 samples, gradients are scaled by 128 / 4, inputs by 1 / 4."""
    stats = {
        "act_l2": torch.tensor([36.0, 4.0]),
        "grad_l1": torch.tensor([[2.0, 1.0]]),
        "grad_l2": torch.tensor([[2.0, 8.0]]),
        "grad_sum": torch.tensor([[-1.0, 0.0]]),
    }
    score = reference_score(method, torch.tensor([[-2.0, 3.0]]), stats, 4, 10.0, grad_norm)
    assert score.dtype == torch.float64
    assert score.tolist() == expected


# ---- statistics ----


def toy_layer(*, transposed: bool) -> nn.Module:
    """Make a seeded float64 layer of 4 inputs and 3 outputs, its weight stored either way round."""
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(4, 3)
    if transposed:
        layer = Conv1D(3, 4)
    return layer.double()


def slopes(layer: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """Give the gradient (out, in) of `loss` in the layer's weight, entry by entry."""
    weight = oriented(layer, layer.get_parameter("weight"))  # (out, in), a view
    rows, columns = weight.shape
    return torch.tensor(
        [[finite_difference(loss, weight, (i, j)) for j in range(columns)] for i in range(rows)],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_statistics_of_one_layer_match_finite_differences(*, transposed: bool) -> None:
    """On a float64 toy of one layer every sum equals what differences of the loss give."""
    layer = toy_layer(transposed=transposed)
    samples = torch.randn(2, 1, 5, 4, dtype=torch.float64)  # (N, 1, T, in)

    def loss_of(sample: Tensor) -> Tensor:
        return torch.tanh(layer(sample)).mean()

    stats = layer_statistics({"toy": layer}, loss_of, list(samples))["toy"]
    first, second = (slopes(layer, partial(loss_of, sample)) for sample in samples)
    assert (first * second < 0).any()  # some signs cancel: the three sums differ
    inputs = samples.reshape(-1, 4)  # (N T, in)
    outputs = torch.tanh(layer(samples)).detach().reshape(-1, 3)  # (N T, out)
    slope = (1 - outputs.square()) / outputs[: len(outputs) // 2].numel()  # of one sample's mean
    expected = {
        "grad_l1": first.abs() + second.abs(),
        "grad_l2": first.square() + second.square(),
        "grad_sum": first + second,
        "act_l2": samples.square().sum(dim=(0, 1, 2)),
        "act_sum": samples.sum(dim=(0, 1, 2)),
        "hessian": inputs.T @ inputs,
        "grad_cov": slope.T @ slope,
    }
    torch.testing.assert_close(stats, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_statistics_differentiate_the_mean_token_loss(family: str) -> None:
    """A model's gradient is that of its mean loss over T - 1 tokens, seen as (out, in)."""
    ids = random_ids(VOCAB_SIZE, 1, 12, seed=1)
    model = tiny_model(family)
    stats = reference_statistics(model, ids)
    model = model.double()

    def loss() -> Tensor:
        return cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])

    for name, layer in block_linears(model).items():
        weight = oriented(layer, layer.get_parameter("weight"))  # (out, in)
        assert stats[name]["grad_sum"].shape == weight.shape
        index = (weight.shape[0] - 1, 2)
        expected = finite_difference(loss, weight, index)
        assert stats[name]["grad_sum"][index].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


# ---- models ----


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_sliding_window_is_in_force(family: str) -> None:
    """In the first block a query beyond the window no longer sees the first token."""
    model = tiny_model(family)
    ids = random_ids(VOCAB_SIZE, 1, SLIDING_WINDOW + 4, seed=4)
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % VOCAB_SIZE
    states, changed = (
        model(x, output_hidden_states=True).hidden_states[1][0] for x in (ids, other)
    )  # (T, hidden)
    assert torch.equal(states[SLIDING_WINDOW:], changed[SLIDING_WINDOW:])
    assert not torch.equal(states[SLIDING_WINDOW - 1], changed[SLIDING_WINDOW - 1])


# ---- evaluation ----


def test_perplexity_averages_full_windows() -> None:
    """Two windows of four out of ten tokens: the tail is dropped, no token sees another window."""
    model = tiny_model("llama")
    stream = random_ids(VOCAB_SIZE, 1, 10, seed=6)[0]
    losses = []
    for window in (stream[:4], stream[4:8]):
        log_p = model(window[None]).logits[0].double().log_softmax(dim=-1)
        losses.append(-(log_p[0, window[1]] + log_p[1, window[2]] + log_p[2, window[3]]).item() / 3)
    expected = math.exp((losses[0] + losses[1]) / 2)
    assert reference_perplexity(model, stream, 4) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="no full window of 11"):
        reference_perplexity(model, stream, 11)
