"""Formulas: what they mean, and what they refuse."""

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradpipe import InputError
from gradpipe.stages.prune.formula import Expression, relative_importance
from gradpipe.stages.prune.methods import METHODS, find_score
from gradpipe.stages.prune.score import LayerStatistics, score_layer

METHODS_PAGE = Path(__file__).parents[3] / "docs" / "methods.md"
WEIGHT = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.25, -1.0]])
NORMS = LayerStatistics(
    values={
        "act_l2": torch.tensor([1.0, 2.0, 3.0]),
        "grad_l1": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        "grad_l2": torch.tensor([[2.0, 1.0, 2.0], [1.0, 2.0, 1.0]]),
        "grad_sum": torch.tensor([[-1.0, 1.0, -2.0], [2.0, -3.0, 3.0]]),
    },
    num_samples=dict.fromkeys(("act_l2", "grad_l1", "grad_l2", "grad_sum"), 128),
)
VALUES = {
    "W": WEIGHT.double(),
    "X": NORMS.scaled("act_l2").double(),
    "G1": NORMS.scaled("grad_l1").double(),
    "G2": NORMS.scaled("grad_l2").double(),
    "GS": NORMS.values["grad_sum"].double(),
    "G": NORMS.scaled("grad_l2").double(),
    "a": torch.tensor(7.0).double(),
    "tensor": lambda number: torch.tensor(number, dtype=torch.float64),
    "abs": torch.abs,
    "sqrt": torch.sqrt,
    "log": torch.log,
}


def meant(text: str) -> Tensor:
    """The formula by Python itself, in float64."""
    text = re.sub(r"(?<![\w.])(\d+(\.\d+)?)", r"tensor(\1)", text)
    value = eval(text, {"__builtins__": {}}, VALUES)  # noqa: S307 (our own text, to compare with)
    return torch.as_tensor(value).expand_as(WEIGHT)


@pytest.mark.parametrize(
    "text",
    [
        "abs(W)*(a*G+X)",
        "abs(W)*(a*G1+X)",
        "abs(W) * X * G2",
        "W**2*G2**2",
        "(a*G1+X)*abs(W)",
        "X + abs(W)*G1 - GS/2",
        "abs(W)/(1+X)",
        "-abs(W)+3.5",
        "+abs(W)*(+G1)-(+G2)",
        "sqrt(abs(W)*G1)+log(G2+1)",
        "2**X*abs(W)",
        "G1*G1*abs(W)",
        "X*X-a*abs(W)",
    ],
)
def test_a_formula_means_what_it_says(text: str) -> None:
    """It gives what Python's own arithmetic gives, and leaves the statistics as they were."""
    before = {name: value.clone() for name, value in NORMS.values.items()}
    score = score_layer("layer", WEIGHT, NORMS, find_score(text, "l2", 7.0))
    torch.testing.assert_close(score.double(), meant(text), rtol=1e-6, atol=1e-6)
    assert score.dtype is torch.float32
    assert all(torch.equal(NORMS.values[name], value) for name, value in before.items())
    assert torch.equal(WEIGHT, torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.25, -1.0]]))


_W, _X = WEIGHT.double().abs(), NORMS.values["act_l2"].double() / 128**0.5
_G = {name: NORMS.values[f"grad_{name}"].double() for name in ("l1", "l2", "sum")}


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # the list in docs/methods.md
        ("abs(W)", _W),
        ("abs(W)*X", _W * _X),
        ("abs(W)*G1", _W * _G["l1"]),
        ("abs(W)*G2", _W * _G["l2"]),
        ("abs(W*GS)", (WEIGHT.double() * _G["sum"]).abs()),
        ("abs(W)*X*G1", _W * _X * _G["l1"]),
        ("abs(W)*X*G2", _W * _X * _G["l2"]),
        ("abs(W)*(X+G1)", _W * _X + _W * _G["l1"]),
        ("abs(W)*(X+G2)", _W * _X + _W * _G["l2"]),
        ("abs(W)*(X+a*G1)", _W * _X + 100 * _W * _G["l1"]),
        ("abs(W)*(X+a*G2)", _W * _X + 100 * _W * _G["l2"]),
    ],
)
def test_the_metrics_of_gblm_are_formulas(text: str, expected: Tensor) -> None:
    """Products and sums of weight, activation and gradient, as they are listed in the docs."""
    score = score_layer("layer", WEIGHT, NORMS, find_score(text, "l1", 100.0)).double()
    torch.testing.assert_close(score, expected, rtol=1e-6, atol=1e-6)
    assert f"`{text}`" in METHODS_PAGE.read_text()


def test_the_sum_of_gradients_has_its_sign_in_a_formula_and_none_as_a_norm() -> None:
    """GS is ΣG, so that a Taylor term can be written; G of --grad-norm sum is |ΣG|."""
    signed = score_layer("layer", WEIGHT, NORMS, find_score("abs(W)*GS", "sum", 1.0))
    size = score_layer("layer", WEIGHT, NORMS, find_score("abs(W)*G", "sum", 1.0))
    assert torch.equal(signed, WEIGHT.abs() * NORMS.values["grad_sum"])
    assert torch.equal(size, signed.abs())


_LEAVES = st.sampled_from(["abs(W)", "X", "G1", "G2", "GS", "G", "a", "2", "0.5"])
_FORMULAS = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda t: f"({t[0]}{t[1]}{t[2]})"),
        inner.map(lambda x: f"abs({x})"),
    ),
    max_leaves=8,
)


@given(_FORMULAS)
@settings(max_examples=200, deadline=None)
def test_any_formula_means_what_it_says(text: str) -> None:
    """Of whatever parts, the value is right."""
    whole = f"abs(W)+({text})"
    score = score_layer("layer", WEIGHT, NORMS, find_score(whole, "l2", 7.0))
    torch.testing.assert_close(score.double(), meant(whole), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "abs(W",
        "X",  # not of the weights
        "__import__('os').system('true')",
        "W.__class__",
        "[W]",
        "W if X else G",
        "lambda: W",
        "abs(W, X)",
        "max(W)",
        "W@X",
        "W<X",
        "W and X",
        "'W'",
        "W*True",
        "W*1j",
        "W*Y",
        "abs(x=W)",
        "W*1e999",
        "W*1e300",  # beyond float32
        "abs(W)*(1/0)",
        "abs(W)+log(0)",
        "abs(W)*sqrt(2-3)",
        "abs(W)*2**(9**9)",
        "abs(W)**(0/0)",
        "W^2",
        "W*1" + "0" * 400,
        "W; X",
        "(W:=X)",
        "W" + "+W" * 400,
        "(" * 240 + "W" + ")" * 240,
    ],
)
def test_anything_else_is_refused_in_one_line(text: str) -> None:
    """Parsed, never evaluated; the line says what is not understood."""
    with pytest.raises(InputError) as caught:
        Expression.parse(text)
    assert "\n" not in str(caught.value).replace("\\n", "")


def test_the_line_says_how_a_power_is_written() -> None:
    """Operators are part of what is expected; what is not finite is named."""
    with pytest.raises(InputError, match=re.escape("'W^2' is not understood")) as caught:
        Expression.parse("X*(W^2)")
    assert "+ - * / ** (a power)" in str(caught.value)
    with pytest.raises(InputError, match=re.escape("1/(3-3) is no finite number")):
        Expression.parse("abs(W) * (2 + 1/(3-3))")


def test_a_formula_says_which_statistics_it_reads() -> None:
    """`G` is the norm chosen; nothing else is read."""
    assert Expression.parse("abs(W)").statistics("l1") == ()
    assert set(Expression.parse("abs(W)*(a*G+X)").statistics("l2")) == {"grad_l2", "act_l2"}
    assert Expression.parse("abs(W)*GS").statistics("l1") == ("grad_sum",)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.formula])
def test_a_method_is_its_formula(name: str) -> None:
    """Named methods are entries of the same table."""
    formula = METHODS[name].formula
    assert formula is not None
    scores = [find_score(text, "l1", 100.0) for text in (name, formula)]
    by_name, by_formula = (score_layer("layer", WEIGHT, NORMS, score) for score in scores)
    assert torch.equal(by_name, by_formula)


def test_relative_importance_of_dead_rows_and_columns_is_zero() -> None:
    """No division by zero."""
    weight = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    assert torch.equal(relative_importance(weight), torch.tensor([[0.0, 0.0], [0.0, 2.0]]))
    assert math.isfinite(float(relative_importance(torch.zeros(2, 2)).sum()))
