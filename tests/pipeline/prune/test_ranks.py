"""Ranks: one pruning by several processes writes what one process writes, to the byte."""

import os
import signal
import time
from pathlib import Path

import pytest

from gradpipe import collect, prune
from tests.support.cases import collecting, files_of, pruning, written
from tests.support.forked import Processes
from tests.support.ranked import lines, run, start

TARGETS = ("--sparsity", "0.5", "--pattern", "2:4")


@pytest.fixture(scope="module", params=["1MB", "40KB"], ids=["one file", "several"])
def place(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A checkpoint and a store of it."""
    folder = written(tmp_path_factory.mktemp("place"), max_shard_size=request.param)
    statistics = ("grad_l1", "grad_l2", "act_l2", "hessian")
    collect(collecting(folder, num_samples=3, statistics=statistics))
    return folder


@pytest.mark.parametrize("options", [{}, {"allocation": "owl"}, {"method": "sparsegpt"}], ids=str)
def test_ranks_write_what_one_process_writes(
    place: Path, tmp_path: Path, pipes: Processes, options: dict[str, str]
) -> None:
    """A formula, an allocation that looks at all scores, a solver; nothing is left beside OUT."""
    more = [word for name, value in options.items() for word in (f"--{name}", value)]
    if "allocation" in options:
        more += ["--sparsity", "0.6"]
    else:
        more += TARGETS
    paths = [place / "model", place / "store", tmp_path / "ranks"]
    table = run(pipes, 3, "prune", *paths, *more)
    sparsities = (0.6,) if "allocation" in options else (0.5,)
    patterns = () if "allocation" in options else ("2:4",)
    lone = pruning(place, tmp_path / "lone", sparsities=sparsities, patterns=patterns, **options)
    prune(lone)
    assert table.strip()
    assert files_of(tmp_path / "ranks") == files_of(tmp_path / "lone")
    assert {path.name for path in tmp_path.iterdir()} == {"ranks", "lone"}


def test_a_lost_rank_ends_all_and_leaves_nothing(
    place: Path, tmp_path: Path, pipes: Processes
) -> None:
    """The others end with 75 and a line; OUT is not there, and the same command makes it."""
    targets = [word for i in range(1, 60) for word in ("--sparsity", f"{i / 100}")]
    ours = ["prune", place / "model", place / "store", tmp_path / "out", *targets]
    ids = start(pipes, 2, *ours)
    while not (tmp_path / ".out.partial").exists() and pipes.is_alive(ids[0]):
        time.sleep(0.001)
    os.kill(ids[1], signal.SIGKILL)
    [first, second] = lines(pipes, ids)
    assert second[0] == -signal.SIGKILL
    said = "pipe: rank 0: another rank has ended: run the same command again\n"
    assert first == (75, said)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_with_another_method_is_named(place: Path, tmp_path: Path, pipes: Processes) -> None:
    """All refuse, one tells, nothing is written."""
    ours = ["prune", place / "model", place / "store", tmp_path / "out"]
    [first, second] = lines(pipes, start(pipes, 2, *ours, others=[*ours, "--method", "wanda"]))
    assert first[0] == second[0] == 2
    assert "rank 1 has --method wanda, rank 0 has gblm" in first[1]
    assert second[1] == ""
    assert list(tmp_path.iterdir()) == []
