"""SparseGPT, OBS, least squares and ALPS against float64 oracles, and the laws they keep."""

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from gradpipe import GradpipeError
from gradpipe.stages.prune.alps import Eigenbasis, alps
from gradpipe.stages.prune.curvature import Curvature
from gradpipe.stages.prune.layer import SolvedLayer
from gradpipe.stages.prune.least_squares import least_squares
from gradpipe.stages.prune.mask import pattern_mask, unstructured_mask
from gradpipe.stages.prune.methods import METHODS, UPDATES, ChosenMethod
from gradpipe.stages.prune.score import LayerStatistics
from gradpipe.stages.prune.sparsegpt import obs_update, sparsegpt
from gradpipe.stages.prune.target import Budget, Group, Pattern
from tests.support.reference import reference_mask, reference_nm_mask
from tests.support.reference_solvers import (
    damped,
    reference_alps_mask,
    reference_cost,
    reference_least_squares,
    reference_sparsegpt,
)

ROWS, COLUMNS = 12, 24


def moment(size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A second moment of correlated values of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    values = torch.randn(4 * size, size, generator=generator, dtype=torch.float64) @ mixing
    values *= torch.logspace(-1, 1, size, dtype=torch.float64)
    return (values.T @ values).to(dtype)


def weights(seed: int, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """A weight, float64 (out, in)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def curvature(seed: int, kind: str = "input", columns: int = COLUMNS) -> Curvature:
    """A curvature in float64."""
    cov = moment(ROWS, seed + 1) if kind == "kfac" else None
    return Curvature.of("layer", moment(columns, seed), cov)


@pytest.fixture(params=["input", "kfac"])
def kind(request: pytest.FixtureRequest) -> str:
    """Either curvature."""
    return str(request.param)


# --- curvature


def unscaled(matrix: Tensor) -> Tensor:
    """A second moment whatever its unit: with a mean diagonal of 1."""
    return matrix / matrix.diagonal().mean()


def test_damping_adds_a_share_of_the_mean_diagonal() -> None:
    """1 % for inputs, 10 % for output gradients; a sound matrix needs no note."""
    got = curvature(3, "kfac")
    assert torch.allclose(unscaled(got.hessian), unscaled(damped(moment(COLUMNS, 3), 0.01)))
    assert got.cov is not None
    assert torch.allclose(unscaled(got.cov), unscaled(damped(moment(ROWS, 4), 0.1)))
    assert got.notes == []


def test_an_ill_conditioned_hessian_is_damped_more_and_says_so() -> None:
    """Each further damping is said; what comes out can be solved with."""
    bad = moment(COLUMNS, 5)
    bad -= 0.03 * bad.diagonal().mean() * torch.eye(COLUMNS)  # as rounding may leave it
    got = Curvature.of("layer", bad.clone(), None)
    assert got.notes == ["layer: hessian is ill-conditioned: damped by 0.1"]
    assert torch.allclose(unscaled(got.hessian), unscaled(damped(bad, 0.1)))
    assert torch.isfinite(got.inverse_factor()).all()


def test_a_hessian_of_zeros_is_said_and_counts_weights_alike() -> None:
    """A layer that is never fed is pruned by size, aloud."""
    got = Curvature.of("layer", torch.zeros(4, 4), None)
    assert torch.equal(got.hessian, torch.eye(4))
    assert "all zeros" in got.notes[0]


@pytest.mark.parametrize("bad", [float("nan"), -1e6])
def test_what_is_no_second_moment_is_refused(bad: float) -> None:
    """Damping is tried a few times, then it is an error that names the layer."""
    matrix = moment(4, 0)
    matrix[1, 1] = bad
    with pytest.raises(GradpipeError, match="layer: hessian is not positive definite"):
        Curvature.of("layer", matrix, None)


# --- SparseGPT and OBS


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8), Pattern(1, 3)])
def test_sparsegpt_by_pattern_is_the_oracle(pattern: Pattern) -> None:
    """Masks equal, weights to float64's rounding."""
    weight, moments = weights(0), curvature(1)

    def choose(scores: Tensor, _: int) -> Tensor:
        return reference_nm_mask(scores, pattern.n, pattern.m)

    expected, kept = reference_sparsegpt(weight, moments.hessian, choose, pattern.m)
    got, mask = sparsegpt(weight, moments.inverse_factor(), pattern.sparsity, pattern)
    assert torch.equal(mask, kept)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("columns", [24, 128, 200])
def test_sparsegpt_unstructured_is_the_oracle(columns: int) -> None:
    """One threshold for 128 columns over all rows; counts add up to the layer's."""
    weight, moments = weights(2, columns=columns), curvature(3, columns=columns)
    sparsity = Fraction(6, 10)

    def choose(scores: Tensor, start: int) -> Tensor:
        upto = [int(sparsity * ROWS * x) for x in (start, start + scores.shape[1])]
        order = sorted(range(scores.numel()), key=lambda i: (scores.flatten()[i].item(), i))
        kept = torch.ones(scores.numel(), dtype=torch.bool)
        kept[order[: upto[1] - upto[0]]] = False
        return kept.reshape(scores.shape)

    expected, kept = reference_sparsegpt(weight, moments.hessian, choose, 128)
    got, mask = sparsegpt(weight, moments.inverse_factor(), sparsity, None)
    assert torch.equal(mask, kept)
    assert int((~mask).sum()) == int(sparsity * weight.numel())
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


def test_obs_updates_a_given_mask_as_the_oracle_does() -> None:
    """The same sweep, nothing to choose."""
    weight, moments = weights(4), curvature(5)
    mask = reference_mask(weight.abs(), 0.5, "output")
    expected, _ = reference_sparsegpt(
        weight, moments.hessian, lambda scores, j: mask[:, j : j + scores.shape[1]], COLUMNS
    )
    got = obs_update(weight, mask, moments.inverse_factor())
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)
    assert reference_cost(weight - got, moments.hessian) < reference_cost(
        weight - weight * mask, moments.hessian
    )


# --- units


@pytest.mark.parametrize("unit", [2.0**-100, 2.0**-60, 2.0**60, 2.0**90])
@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_the_unit_of_second_moments_does_not_matter(method: str, unit: float, kind: str) -> None:
    """Of a power of 4 not to a bit, though products of them would be beyond float32."""
    weight = weights(30).float()
    hessian, cov = (moment(size, 31, torch.float32) for size in (COLUMNS, ROWS))
    budget = Budget(Fraction(1, 2))
    expected, got = (
        pruned(weight, method, budget, x * hessian, x * cov if kind == "kfac" else None)[0]
        for x in (1, unit)
    )
    assert torch.equal(got, expected)


# --- inputs and outputs that are dead

DEAD = [0, 5, 6, 7, 17]


def pruned(
    weight: Tensor, method: str, budget: Budget, hessian: Tensor, cov: Tensor | None = None
) -> tuple[Tensor, list[str]]:
    """A layer pruned from its second moments, and what is said about it."""
    values = {"hessian": hessian.clone()} | ({} if cov is None else {"grad_cov": cov.clone()})
    curvature = "input" if cov is None else "kfac"
    group = Group.parse("layer")
    chosen = ChosenMethod(
        method=METHODS[method],
        score=None,
        update=UPDATES["none"],
        curvature=curvature,
        group=group,
    )
    statistics = LayerStatistics(values=values, num_samples={})
    layer = SolvedLayer.of("layer", weight, statistics, chosen, [budget], transposed=False)
    return layer.to(budget), [*layer.notes]


def with_dead(size: int, seed: int, dead: list[int]) -> Tensor:
    """A second moment of values some of which are always zero."""
    matrix = moment(size, seed)
    matrix[dead] = matrix[:, dead] = 0
    return matrix


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)])
@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_weights_of_dead_inputs_go_first(method: str, pattern: Pattern | None) -> None:
    """The oracles on a weight whose dead columns are zeroed first, as the published code has it."""
    weight, hessian = weights(20), with_dead(COLUMNS, 21, DEAD)
    zeroed, moments = weight.clone(), damped(hessian, 0.01)
    zeroed[:, DEAD] = 0

    def choose(scores: Tensor, _: int = 0) -> Tensor:
        return reference_nm_mask(scores, 2, 4) if pattern else reference_mask(scores, 0.5, "layer")

    if method == "sparsegpt":
        width = pattern.m if pattern else COLUMNS
        expected, mask = reference_sparsegpt(zeroed, moments, choose, width)
    else:
        mask = reference_alps_mask(zeroed, moments, None, choose)
        expected = reference_least_squares(zeroed, mask, moments)
    got, notes = pruned(weight, method, Budget(Fraction(1, 2), pattern), hessian)
    assert torch.equal(got != 0, mask)
    assert bool((got[:, DEAD] == 0).all()) == (pattern is None)  # 2:4 keeps one of 4, 5, 6, 7
    got[:, DEAD] = expected[:, DEAD] = 0  # they cost nothing but for the damping
    best = reference_cost(zeroed - expected, moments)
    most = 1 + 1e-6 if method == "sparsegpt" else 1.01
    assert reference_cost(zeroed - got, moments) < most * best
    assert notes == ["layer: 5 of 24 inputs are always zero: their weights cost nothing"]


def test_weights_of_dead_outputs_go_first_under_kfac() -> None:
    """No gradient reaches them: they are worth nothing to the loss."""
    weight, hessian, cov = weights(22), with_dead(COLUMNS, 23, [4]), with_dead(ROWS, 24, [1, 7])
    zeroed = weight.clone()
    zeroed[:, 4] = zeroed[[1, 7]] = 0
    mask = reference_alps_mask(
        zeroed, damped(hessian, 0.01), damped(cov, 0.1), lambda x: reference_mask(x, 0.5, "layer")
    )
    got, notes = pruned(weight, "alps", Budget(Fraction(1, 2)), hessian, cov)
    assert torch.equal(got != 0, mask)
    assert not got[[1, 7]].any()
    assert notes[1] == "layer: 2 of 12 outputs have no gradient: their weights cost nothing"


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_more_dead_weights_than_are_to_go_stay_as_they_were(method: str) -> None:
    """The count is still exact, nothing alive is touched, and nothing turns to zero unasked."""
    weight, hessian = weights(25), with_dead(COLUMNS, 26, DEAD)
    got, _ = pruned(weight, method, Budget(Fraction(1, 8)), hessian)
    assert int((got == 0).sum()) == weight.numel() // 8
    torch.testing.assert_close(got[got != 0], weight[got != 0], rtol=1e-9, atol=0)
    live = [i for i in range(COLUMNS) if i not in DEAD]
    assert bool(got[:, live].all())


@pytest.mark.parametrize("update", ["obs", "lsq"])
def test_updates_leave_live_weights_alone_when_dead_ones_go(update: str) -> None:
    """What cost nothing needs no making up for."""
    weight, moments = weights(27), Curvature.of("layer", with_dead(COLUMNS, 28, DEAD), None)
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[:, DEAD] = False
    if update == "obs":
        got = obs_update(weight, mask, moments.inverse_factor())
    else:
        got = least_squares(weight, mask, moments)
    torch.testing.assert_close(got, weight * mask, rtol=1e-9, atol=1e-12)


# --- least squares


def test_least_squares_solves_the_normal_equations(kind: str) -> None:
    """Rows alone, or all of the layer's weights at once under the Kronecker product."""
    weight, moments = weights(6), curvature(7, kind)
    mask = reference_mask(weight.abs(), 0.5, "output")
    expected = reference_least_squares(weight, mask, moments.hessian, moments.cov)
    got = least_squares(weight, mask, moments)
    assert bool((got[~mask] == 0).all())
    best = reference_cost(weight - expected, moments.hessian, moments.cov)
    start = reference_cost(weight - weight * mask, moments.hessian, moments.cov)
    reached = reference_cost(weight - got, moments.hessian, moments.cov)
    assert reached - best < 0.02 * (start - best)  # thirty steps: at least 98 % of the way
    if kind == "input":
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_least_squares_never_costs_more_than_masking(
    kind: str, seed: int, dtype: torch.dtype
) -> None:
    """The law, in the weight's own dtype, for masks good and bad, singular moments among them."""
    generator = torch.Generator().manual_seed(seed)
    solved_in = torch.float32 if dtype is torch.bfloat16 else dtype
    hessian = moment(COLUMNS, seed, solved_in)
    if seed % 4 == 0:
        hessian[3] = hessian[:, 3] = 0  # an input that is always zero
    if seed % 4 == 1:
        factor = torch.randn(2, COLUMNS, generator=generator, dtype=solved_in)
        hessian = factor.T @ factor  # of rank two
    cov = moment(ROWS, seed + 50, solved_in) if kind == "kfac" else None
    moments = Curvature.of("layer", hessian, cov)
    weight = weights(seed + 9).to(dtype)
    exact_cov = None if moments.cov is None else moments.cov.double()
    exact = Curvature(moments.hessian.double(), exact_cov, moments.free)
    for share in (0.02, 0.6):
        mask = torch.rand(ROWS, COLUMNS, generator=generator) > share
        updated = least_squares(weight, mask, moments)
        assert updated.dtype is dtype
        changes = [(weight.double() - x.double()) for x in (weight * mask, updated)]
        costs = [x * exact.times(x) for x in changes]
        before, after = (x.sum(dim=1) if kind == "input" else x.sum() for x in costs)
        assert bool((after <= before * (1 + 1e-5)).all())


@pytest.mark.parametrize("seed", range(4))
def test_rounding_never_costs_more_than_there_was_to_gain(kind: str, seed: int) -> None:
    """A tiny weight a row goes from large ones in bfloat16: moving those by half a step is dear."""
    cov = moment(ROWS, seed + 50, torch.float32) if kind == "kfac" else None
    moments = Curvature.of("layer", moment(COLUMNS, seed, torch.float32), cov)
    weight = weights(seed + 70) * torch.logspace(-3, 2, COLUMNS, dtype=torch.float64)
    weight = weight.to(torch.bfloat16)
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[:, seed] = False
    updated = least_squares(weight, mask, moments)
    changes = [(weight - x).float() for x in (weight * mask, updated)]
    costs = [x * moments.times(x) for x in changes]
    before, after = (x.sum(dim=1) if kind == "input" else x.sum() for x in costs)
    assert bool((after <= before * (1 + 1e-4)).all())


def test_least_squares_keeps_what_needs_no_change(kind: str) -> None:
    """A mask that keeps everything changes nothing; one that keeps nothing leaves nothing."""
    weight, moments = weights(8), curvature(9, kind)
    assert torch.equal(
        least_squares(weight, torch.ones_like(weight, dtype=torch.bool), moments), weight
    )
    assert not least_squares(weight, torch.zeros_like(weight, dtype=torch.bool), moments).any()


def test_least_squares_beats_obs_on_the_same_mask() -> None:
    """OBS is greedy; the minimum is not."""
    weight, moments = weights(10), curvature(11)
    mask = reference_mask(weight.abs(), 0.6, "output")
    greedy = reference_cost(
        weight - obs_update(weight, mask, moments.inverse_factor()), moments.hessian
    )
    assert reference_cost(weight - least_squares(weight, mask, moments), moments.hessian) < greedy


# --- ALPS


@pytest.mark.parametrize("choice", ["output", "layer", "2:4"])
def test_alps_finds_the_oracles_support(kind: str, choice: str) -> None:
    """Eigenbasis or dense solve, the iterates are the same, and so is the mask."""
    weight, moments = weights(12), curvature(13, kind)
    select: Callable[[Tensor], Tensor]
    choose: Callable[[Tensor], Tensor]
    if choice == "2:4":
        select = lambda scores: pattern_mask(scores, Pattern(2, 4))  # noqa: E731
        choose = lambda scores: reference_nm_mask(scores, 2, 4)  # noqa: E731
    else:
        group = Group.parse(choice)
        select = lambda scores: unstructured_mask(scores, Fraction(1, 2), group)  # noqa: E731
        choose = lambda scores: reference_mask(scores, 0.5, choice)  # noqa: E731
    expected = reference_alps_mask(weight, moments.hessian, moments.cov, choose)
    _, got = alps(weight, Eigenbasis.of(moments), select)
    assert torch.equal(got, expected)


def test_alps_costs_less_than_magnitude_and_sparsegpt(kind: str) -> None:
    """What it is for: a better support, then least squares on it."""
    weight, moments = weights(14), curvature(15, kind)
    group, half = Group.parse("layer"), Fraction(1, 2)
    _, found = alps(
        weight, Eigenbasis.of(moments), lambda scores: unstructured_mask(scores, half, group)
    )
    largest = unstructured_mask(weight.abs(), half, group)
    swept, _ = sparsegpt(weight, moments.inverse_factor(), half, None)

    def cost(pruned: Tensor) -> float:
        return reference_cost(weight - pruned, moments.hessian, moments.cov)

    best = cost(least_squares(weight, found, moments))
    assert best < cost(least_squares(weight, largest, moments))
    assert best < cost(swept)
