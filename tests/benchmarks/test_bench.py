"""`make bench` runs all of its parts, here on toys; the growth of both stages is drawn alike."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from benchmarks import bench, large, scaling, solvers, startup
from benchmarks.measures import Cost, in_a_fork
from benchmarks.random_llama import LlamaSize
from benchmarks.scaling import Point, exponent, line, plot

TOY = LlamaSize(hidden=32, blocks=1, intermediate=64, heads=2, vocab=300, positions=512)


def test_every_part_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each figure of the table is a positive number with a goal, in one file."""
    monkeypatch.setattr(bench, "LlamaSize", lambda: TOY)
    monkeypatch.setattr(solvers, "LARGE", ((16, 32),))
    monkeypatch.setattr(solvers, "BLOCK", {(16, 16): 1})
    parts = ",".join(name for name in bench.PARTS if name != "startup")  # it has its own test
    with pytest.raises(typer.Exit) as end:
        bench.main(tmp_path / "results" / "cpu.json", only=parts)
    found = json.loads((tmp_path / "results" / "cpu.json").read_text())
    assert (end.value.exit_code, found["errors"]) == (0, {})
    assert {*found["jobs"], "startup"} == {*bench.PARTS}
    for rows in found["jobs"].values():
        assert rows
        for row in rows:
            assert row["goal"] > 0, row
            assert 0 < row["value"] < math.inf, row


def test_a_command_with_another_exit_code_is_not_measured() -> None:
    """What fails at once would seem fast."""
    assert startup.cpu_seconds(["true"]) >= 0
    with pytest.raises(ValueError, match="exit code 1"):
        startup.cpu_seconds(["false"])


def test_work_in_a_fork_is_counted_apart(tmp_path: Path) -> None:
    """Memory and bytes are the work's own; work that fails is no figure."""
    held: list[bytes] = [b"x" * 10_000_000]

    def work() -> None:
        held.append(b"y" * 30_000_000)
        (tmp_path / "file").write_bytes(held[1][:5_000_000])

    cost = in_a_fork(work)
    assert len(held) == 1
    assert 30_000_000 <= cost.peak_bytes < 40_000_000
    assert 5_000_000 <= cost.written_bytes < 5_100_000
    with pytest.raises(ValueError, match="failed in its process"):
        in_a_fork(lambda: 1 / 0)


def test_fits_find_what_they_are_given() -> None:
    """A cube has the exponent 3, a line its start and slope."""
    at = [1.0, 2.0, 4.0, 8.0]
    assert exponent(at, [5 * x**3 for x in at]) == pytest.approx(3)
    assert line(at, [7 + 2 * x for x in at]) == pytest.approx((7, 2))


def test_a_point_of_shards_is_pruned_as_one(tmp_path: Path) -> None:
    """Two ranks share the work: the sum has both, and the output is whole."""
    size = replace(scaling.BASE, blocks=2, hidden=32, intermediate=64)
    one, two = (scaling.measure("ranks", n, size, 2, n, tmp_path / str(n)) for n in (1, 2))
    assert two.collect_sum > two.collect.cpu_seconds
    assert one.collect_sum == one.collect.cpu_seconds
    assert two.out_bytes == pytest.approx(one.out_bytes, rel=0.01)
    assert two.weights == one.weights == 2 * (4 * 32 * 32 + 3 * 32 * 64)


def test_the_same_points_give_the_same_plot(tmp_path: Path) -> None:
    """No date and no random ids are in the file."""
    cost = Cost(cpu_seconds=1.0, peak_bytes=10**6, written_bytes=1)
    points = [
        Point(
            axis=axis, at=at, weights=1, collect=cost, collect_sum=1.0, store_bytes=1, prune=cost,
            prune_sum=1.0, out_bytes=1,
        )
        for axis, values in scaling.AXES.items()
        for at in values
    ]  # fmt: skip
    for name in ("one.svg", "two.svg"):
        plot(points, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_a_block_is_predicted_from_smaller_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the cube of the widths; what a solver needs is counted from its shapes."""
    monkeypatch.setattr(large, "solved", lambda size, _: (size.hidden**3 / 1e6, size.hidden**2))
    rows = [row for row in large.measured([8, 4]) if row[0].startswith("sparsegpt")]
    assert rows[0][4:] == rows[1][4:]
    assert rows[1][2] == rows[1][1]
    one, wide = large.Operations.of(64, 64), large.Operations.of(128, 128)
    assert wide.products == 8 * one.products
    assert wide.decompositions == 8 * one.decompositions == 9 * 2 * 128**3
