"""What the solvers' blocking and early ends must not change, at shapes where blocks meet."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from gradpipe.stages.prune.alps import Eigenbasis, alps
from gradpipe.stages.prune.curvature import Curvature
from gradpipe.stages.prune.least_squares import least_squares
from gradpipe.stages.prune.mask import unstructured_mask
from gradpipe.stages.prune.sparsegpt import obs_update, sparsegpt
from gradpipe.stages.prune.target import Group, Pattern
from tests.stages.prune.test_solvers import moment, weights
from tests.support.reference import reference_mask, reference_nm_mask
from tests.support.reference_solvers import reference_cost, reference_sparsegpt


@pytest.mark.parametrize(
    ("pattern", "columns"),
    [
        (Pattern(16, 32), 160),  # longer than a few columns, and a part that is not whole
        (Pattern(12, 24), 48),  # longer, and not a whole number of few columns
        (Pattern(3, 5), 135),  # does not divide what is charged together, nor 128
        (Pattern(8, 16), 48),
        (Pattern(1, 1), 12),
    ],
)
def test_patterns_of_any_length_are_the_oracle(pattern: Pattern, columns: int) -> None:
    """Every group is decided with all errors left of it charged."""
    weight = weights(30, columns=columns)
    moments = Curvature.of("layer", moment(columns, 31), None)
    expected, kept = reference_sparsegpt(
        weight,
        moments.hessian,
        lambda scores, _: reference_nm_mask(scores, pattern.n, pattern.m),
        pattern.m,
    )
    got, mask = sparsegpt(weight, moments.inverse_factor(), pattern.sparsity, pattern)
    assert torch.equal(mask, kept)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 3), Pattern(16, 32)])
def test_ties_in_a_pattern_go_to_the_lower_index(pattern: Pattern) -> None:
    """Of weights that cost the same, the first of a group go."""
    weight = torch.ones(3, 96, dtype=torch.float64)
    _, mask = sparsegpt(weight, torch.eye(96, dtype=torch.float64), pattern.sparsity, pattern)
    expected = torch.arange(96) % pattern.m >= pattern.m - pattern.n
    assert torch.equal(mask, expected.expand(3, 96))


def test_ties_within_128_columns_go_row_by_row() -> None:
    """As everywhere else: the lower index goes first, rows before columns."""
    weight = torch.ones(4, 128, dtype=torch.float64)
    _, mask = sparsegpt(weight, torch.eye(128, dtype=torch.float64), Fraction(1, 2), None)
    assert not mask[:2].any()
    assert mask[2:].all()


def test_an_update_of_a_given_mask_crosses_parts() -> None:
    """More columns than a part: errors reach those of the next, as the oracle has it."""
    weight = weights(32, columns=150)
    moments = Curvature.of("layer", moment(150, 33), None)
    mask = reference_mask(weight.abs(), 0.5, "output")
    expected, _ = reference_sparsegpt(
        weight, moments.hessian, lambda scores, j: mask[:, j : j + scores.shape[1]], 150
    )
    before = weight.clone()
    got = obs_update(weight, mask, moments.inverse_factor())
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("kind", ["input", "kfac"])
def test_alps_ends_near_the_least_cost_of_its_support(kind: str) -> None:
    """From its weights a few steps get as far as many do from the weights as they were."""
    cov = moment(12, 41) if kind == "kfac" else None
    moments = Curvature.of("layer", moment(24, 40), cov)
    weight, group = weights(42), Group.parse("layer")

    def select(score: Tensor) -> Tensor:
        return unstructured_mask(score, Fraction(1, 2), group)

    found, mask = alps(weight, Eigenbasis.of(moments), select)

    def cost(pruned: Tensor) -> float:
        return reference_cost(weight - pruned, moments.hessian, moments.cov)

    short = least_squares(weight, mask, moments, found, 1e-3)
    assert cost(short) <= 1.02 * cost(least_squares(weight, mask, moments))
    assert cost(short) <= cost(found * mask)
