"""What a report measures of layers, against the plain computation."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from gradpipe.stages.prune.mask import budget_mask
from gradpipe.stages.prune.measures import cuts, histogram, relative_error, shrunk
from gradpipe.stages.prune.target import Budget, Group


def test_a_mask_is_shrunk_to_the_share_of_each_cell() -> None:
    """Every weight counts in one cell; a mask that fits is shown as it is."""
    for rows, columns in ((5, 5), (7, 12), (16, 3), (1, 40)):
        mask = torch.rand(rows, columns) < 0.4
        cells = shrunk(mask, 5)
        assert cells.shape == (min(rows, 5), min(columns, 5))
        for r, c in itertools.product(*map(range, cells.shape)):
            (top, bottom), (left, right) = (
                (i * size // count, (i + 1) * size // count)
                for i, size, count in zip((r, c), mask.shape, cells.shape, strict=True)
            )
            inside = mask[top:bottom, left:right].float()
            assert float(cells[r, c]) == pytest.approx(float(inside.mean()))
    small = torch.rand(4, 3) < 0.5
    assert torch.equal(shrunk(small, 5), small.float())


def test_a_histogram_holds_every_weight_once() -> None:
    """Kept and pruned in the same bins, and scores of 0 apart."""
    score = torch.rand(20, 30).exp()
    score[0, :7] = 0
    kept = score > 1.5
    edges, num_kept, num_pruned = histogram(score, kept)
    assert num_kept.sum() == int(kept.sum())
    assert num_pruned.sum() == int((~kept).sum()) - 7
    lowest = math.log10(float(score[kept].min()))
    assert num_kept[edges[1:] < lowest].sum() == 0


def test_a_histogram_of_nothing_but_zeros_has_no_weight() -> None:
    """A layer that gradients never reach."""
    _, kept, pruned = histogram(torch.zeros(3, 3), torch.zeros(3, 3, dtype=torch.bool))
    assert (kept.sum(), pruned.sum()) == (0, 0)


@pytest.mark.parametrize(
    "group", ["layer", "output", "input", "output:2", "output:4", "output:9", "input:3"]
)
def test_a_cut_is_the_highest_score_that_goes(group: str) -> None:
    """Of each group, as the masks have it."""
    score, half = torch.rand(6, 8) + 0.1, Fraction(1, 2)
    parsed = Group.parse(group)
    pruned = ~budget_mask(score, Budget(half), parsed)
    by_row = (score.T, pruned.T) if parsed.axis == 1 else (score, pruned)
    size = 6 if parsed.axis is None else parsed.size
    tops = torch.stack([s[p].max() for s, p in zip(*(x.split(size) for x in by_row), strict=True)])
    expected = tops.log10().quantile(torch.tensor([0.05, 0.5, 0.95]))
    assert cuts(score, 0.5, parsed) == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_error_is_that_of_the_outputs() -> None:
    """By the inputs themselves; by norms alone, where inputs are uncorrelated."""
    x = torch.randn(50, 6, dtype=torch.float64)
    weight, pruned = torch.randn(4, 6), torch.randn(4, 6)
    moved, whole = (x @ (weight - pruned).T.double()).norm(), (x @ weight.T.double()).norm()
    moment = (x.T @ x).float()
    assert relative_error(weight, pruned, moment) == pytest.approx(float(moved / whole), rel=1e-5)
    apart = torch.linalg.qr(x).Q * torch.arange(1.0, 7)
    full, norms = (apart.T @ apart).float(), apart.norm(dim=0).float()
    assert relative_error(weight, pruned, norms) == pytest.approx(
        relative_error(weight, pruned, full), rel=1e-4
    )
    assert relative_error(weight, weight, moment) == 0
    assert relative_error(torch.zeros(4, 6), torch.zeros(4, 6), moment) == 0
