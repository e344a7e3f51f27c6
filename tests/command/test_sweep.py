"""`pipe sweep`: its table, its lines, and what it refuses in one line."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from gradpipe import DataConfig, SweepConfig, sweep
from gradpipe.pipeline.reports.points import PointResult, sweep_table
from tests.support.cases import LLAMA, Shelf
from tests.support.workplace import PRUNE, Refused

SWEEP = "sweep model store new --dataset text.txt --seq-len 16 --max-windows 2"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (f"{SWEEP} --alpha lots", ("--alpha lots", "a number, 0 or more, or auto")),
        (f"{SWEEP} --method wanda --alpha 1", ("--alpha 1.0", "wanda has none")),
        (f"{SWEEP} --method wonda", ("--method wonda", "magnitude, wanda")),
        (f"{SWEEP} --study tables", ("--study tables", "groups, main")),
        (f"{SWEEP} --study main", ("lacks grad_l2, hessian", "grad_l1,act_l2,grad_l2,hessian")),
        (f"{SWEEP} --study alpha --alpha 1", ("--alpha 1.0", "sets the grid")),
        (f"{SWEEP} --method sparsegpt", ("hessian", "collect again")),
        (f"{SWEEP} --with-store nowhere", ("nowhere",)),
        (f"{SWEEP} --shard 2/2", ("shard 2/2", "0 ≤ I < N")),
        (f"{SWEEP} --seq-len 65", ("--seq-len 65", "64 positions")),
        (f"{SWEEP} --alpha auto", ("--alpha auto", "text.txt", "--alpha-dataset")),
        (SWEEP.replace(" new ", " foreign "), ("foreign", "no results.jsonl")),
        (SWEEP.replace(" new ", " text.txt "), ("text.txt", "a file")),
        (SWEEP.replace(" new ", " store "), ("store", "in one another")),
        (SWEEP.replace(" new ", " s3://bucket/x "), ("is a URL",)),
        (f"{PRUNE} --alpha auto", ("--alpha auto", "pipe sweep")),
        (f"{PRUNE} --alpha lots", ("--alpha lots", "a finite number")),
    ],
)
def test_what_cannot_be_swept_is_refused(
    refused: Refused, command: str, says: tuple[str, ...]
) -> None:
    """In one line, and nothing is written."""
    refused(command, says=says)


@pytest.fixture(scope="module")
def results(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> tuple[PointResult, ...]:
    """Of a small grid."""
    root = shelf.root(LLAMA)
    config = SweepConfig(
        model=str(root / "model"),
        store=str(root / "store"),
        out=tmp_path_factory.mktemp("sweep") / "out",
        methods=("magnitude", "gblm"),
        grad_norms=("l1", "l2"),
        sparsities=(0.5,),
        patterns=("2:4",),
        data=DataConfig(name=str(root / "ids.npy")),
    )
    return sweep(config)


def test_the_table_has_a_row_for_each_way(results: tuple[PointResult, ...]) -> None:
    """Norms are named where they tell points apart; elsewhere than on a terminal it is Markdown."""
    console = Console(file=io.StringIO(), width=200)
    console.print(sweep_table(results, plain=True))
    assert isinstance(console.file, io.StringIO)
    table = [line for line in console.file.getvalue().splitlines() if line.strip()]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0] == ["perplexity", "50 %", "2:4"]
    assert set("".join(cells[1])) <= set("-:")
    assert [row[0] for row in cells[2:]] == ["dense", "magnitude", "gblm l1", "gblm l2"]
    values = [result.metric.value for result in results if result.metric.value is not None]
    assert [x for row in cells[3:] for x in row[1:]] == [f"{value:.2f}" for value in values[1:]]


def test_a_line_is_read_back_as_it_was(results: tuple[PointResult, ...]) -> None:
    """JSON and back, the dense model too."""
    for result in results:
        assert PointResult.from_json(json.loads(json.dumps(result.to_json()))) == result


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_a_table_or_lines(shelf: Shelf, tmp_path: Path, *, is_terminal: bool) -> None:
    """On a terminal a table that grows; elsewhere a line for each point, by its options."""
    root = shelf.root(LLAMA)
    config = SweepConfig(
        model=str(root / "model"),
        store=str(root / "store"),
        out=tmp_path / "out",
        methods=("wanda",),
        alphas=(),
        data=DataConfig(name=str(root / "ids.npy")),
    )
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=100, color_system=None)
    sweep(config, console)
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    if is_terminal:
        assert "50 %" in said
        assert "dense" in said
    else:
        first, second = said.splitlines()
        assert first.startswith("1/2  dense: perplexity ")
        assert second.startswith("2/2  --method wanda --sparsity 0.5: perplexity ")
