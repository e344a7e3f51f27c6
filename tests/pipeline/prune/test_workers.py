"""Layers side by side: the same bytes for any number of workers, and nothing left behind."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from gradpipe import InputError, PruneConfig, collect, prune
from gradpipe.pipeline.prune.workers import side_by_side, worker_count
from gradpipe.stages.prune.mask import budget_mask, budget_masks
from gradpipe.stages.prune.target import Group, parse_targets
from tests.support.cases import collecting, pruning, written


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its store."""
    folder = written(tmp_path_factory.mktemp("inputs"))
    collect(collecting(folder, encoding="compact"))
    return folder


def config(inputs: Path, out: Path, workers: int | None) -> PruneConfig:
    """Two sparsities and a pattern by the default method."""
    return pruning(inputs, out, sparsities=(0.5, 0.6), patterns=("2:4",), workers=workers)


def test_the_number_of_workers_changes_no_byte(inputs: Path, tmp_path: Path) -> None:
    """One, three and the default write the same files."""
    written = []
    for workers in (1, 3, None):
        prune(config(inputs, tmp_path / str(workers), workers))
        files = sorted((tmp_path / str(workers)).rglob("*"))
        written.append([(x.name, x.read_bytes()) for x in files if x.is_file()])
    assert written[0] == written[1] == written[2]


def test_no_workers_are_refused(inputs: Path, tmp_path: Path) -> None:
    """At least one."""
    with pytest.raises(InputError, match="--workers 0: expected at least 1"):
        config(inputs, tmp_path / "out", 0)


def test_an_error_drops_what_waits_and_torch_has_its_threads_again() -> None:
    """What runs ends first; nothing else begins."""
    before, done = torch.get_num_threads(), list[int]()

    def work(number: int) -> None:
        time.sleep(0.01)
        done.append(number)

    def interrupted() -> None:
        with side_by_side(2) as pool:
            pool.map(work, range(1000))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(done) < 1000
    assert torch.get_num_threads() == before


def test_workers_are_at_most_the_threads_that_torch_may_use() -> None:
    """OMP_NUM_THREADS and affinity, as torch sees them, bound the default, not a wish."""
    assert worker_count(None, torch.device("cpu")) <= torch.get_num_threads()
    assert worker_count(5, torch.device("cpu")) == 5


@pytest.mark.parametrize("levels", [2, 40, 10**6])
def test_masks_found_together_are_those_found_alone(levels: int) -> None:
    """Many ties, some, none: sorting once for all sparsities changes no mask."""
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(levels, (37, 48), generator=generator).float()
    budgets = [x.budget for x in parse_targets((0.0, 0.3, 0.5, 0.97), ("2:4",))]
    group = Group.parse("output")
    together = budget_masks(score, budgets, group)
    for mask, budget in zip(together, budgets, strict=True):
        assert torch.equal(mask, budget_mask(score, budget, group))
