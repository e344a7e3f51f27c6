"""A sweep's points as lines over what was varied, or as dots."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gradpipe import InputError
from gradpipe.pipeline.reports import figures
from gradpipe.pipeline.reports.points import sweep_table
from gradpipe.pipeline.reports.series import Sweep
from tests.support.reported import grid, point, write_points


def test_a_sweep_is_a_line_for_each_way_to_prune(tmp_path: Path) -> None:
    """In ascending order of what was varied; patterns stand apart; a torn last line is none."""
    lines = [
        *grid(),
        point({"method": "wanda", "pattern": "2:4"}, 13.0),
        point({"method": "gblm", "sparsity": 0.5, "grad_norm": "l2"}, 12.0),
        point({"method": "ria", "sparsity": 0.5}, None),
    ]
    write_points(tmp_path / "more", lines, torn='{"format": 1, "key"')
    [sweep] = Sweep.read(tmp_path / "more", "more")
    assert sweep.axis == "sparsity"
    assert [(x.name, x.points, x.is_pattern) for x in sweep.series] == [
        ("wanda", (0.5, 0.6, 0.7), False),
        ("gblm l1", (0.5, 0.6, 0.7), False),
        ("wanda", (0.5,), True),
        ("gblm l2", (0.5,), False),
    ]


def test_a_sweep_of_alpha_is_drawn_over_alpha(tmp_path: Path) -> None:
    """Where one target is pruned with several."""
    values = {1.0: 9.5, 10.0: 9.2, 100.0: 9.1}
    write_points(
        tmp_path / "alpha",
        [point({"method": "gblm", "sparsity": 0.5, "alpha": a}, x) for a, x in values.items()],
    )
    [sweep] = Sweep.read(tmp_path / "alpha", "alpha")
    [series] = sweep.series
    assert (sweep.axis, dict(zip(series.points, series.values, strict=True))) == ("α", values)


def test_a_sweep_of_samples_is_drawn_over_their_number(tmp_path: Path) -> None:
    """Where several stores pruned to one target; each method is one line."""
    lines = [
        point({"method": method, "sparsity": 0.5}, 10.0 - n / 100, samples=n)
        for method, n in itertools.product(("wanda", "gblm"), (128, 8, 32))
    ]
    write_points(tmp_path / "samples", lines)
    [sweep] = Sweep.read(tmp_path / "samples", "samples")
    assert sweep.axis == "samples"
    assert [(x.name, x.points) for x in sweep.series] == [
        ("wanda", (8, 32, 128)),
        ("gblm", (8, 32, 128)),
    ]


def test_numbers_beside_axes_are_plain(tmp_path: Path) -> None:
    """No formula's source, be the axis logarithmic or not."""
    values = {0.1: 24.0, 0.5: 31.0, 0.7: 90.0, 0.8: 480.0}
    write_points(
        tmp_path / "wide",
        [point({"method": "wanda", "sparsity": x}, value) for x, value in values.items()],
    )
    [sweep] = Sweep.read(tmp_path / "wide", "wide")
    drawn = figures.sweep(sweep, "wide").inline()
    assert ">100</text>" in drawn
    assert "mathdefault" not in drawn


def test_a_sweep_at_one_share_is_a_dot_for_each_target(tmp_path: Path) -> None:
    """A row for each way to prune; an option that only some targets have tells no rows apart."""
    lines = [
        point({"method": "wanda", "sparsity": 0.5, "group": "output"}, 10.0),
        point({"method": "wanda", "pattern": "2:4"}, 12.0),
        point({"method": "gblm", "sparsity": 0.5, "grad_norm": "l1"}, 9.0),
        point({"method": "gblm", "sparsity": 0.5, "grad_norm": "l2"}, 9.5),
    ]
    write_points(tmp_path / "dots", lines)
    [sweep] = Sweep.read(tmp_path / "dots", "dots")
    assert (sweep.axis, sweep.rows) == ("", ("wanda", "gblm l1", "gblm l2"))
    assert [(x.name, x.points, x.values) for x in sweep.series] == [
        ("50 %", (0, 1, 2), (10.0, 9.0, 9.5)),
        ("2:4", (0,), (12.0,)),
    ]
    alt = figures.sweep(sweep, "dots").alt
    assert "Best first: gblm l1 at 50 %: 9; gblm l2 at 50 %: 9.5;" in alt


def told(folder: Path, lines: Sequence[dict[str, Any]]) -> list[tuple[str, tuple[float, ...]]]:
    """Each series' name and values of what is one sweep; the table has as many cells."""
    write_points(folder, lines)
    [sweep] = Sweep.read(folder, "told")
    table = sweep_table(sweep.results)
    rows = [[*column.cells] for column in table.columns[1:]]
    assert sum(cell != "" for row in rows for cell in row) == len(lines)
    return [(x.name, x.values) for x in sweep.series]


def test_points_of_two_stores_are_two_lines(tmp_path: Path) -> None:
    """Be they of as many samples, and of one name in two folders."""
    shares = (0.5, 0.7)
    stores = [{"name": name, "digest": x * 32} for name, x in (("a", "a"), ("b", "b"), ("b", "c"))]
    lines = [
        point({"method": "wanda", "sparsity": x}, 10.0 * x + n, samples=8, store=store)
        for x, (n, store) in itertools.product(shares, enumerate(stores))
    ]
    assert told(tmp_path / "two", lines[:2] + lines[3:5]) == [
        ("wanda a", (5.0, 7.0)),
        ("wanda b", (6.0, 8.0)),
    ]
    assert told(tmp_path / "three", lines) == [
        ("wanda a aaaaaaaa", (5.0, 7.0)),
        ("wanda b bbbbbbbb", (6.0, 8.0)),
        ("wanda b cccccccc", (7.0, 9.0)),
    ]


def test_points_of_two_commands_are_told_apart_by_their_options(tmp_path: Path) -> None:
    """By those alone without which they would be one."""
    lines = [
        point({"method": "alps", "sparsity": x}, 10.0 * x + len(options), options=options)
        for x in (0.5, 0.7)
        for options in ({}, {"--curvature": "kfac"}, {"--curvature": "kfac", "--include": ["mlp"]})
    ]
    assert told(tmp_path / "two", lines) == [
        ("alps", (5.0, 7.0)),
        ("alps --curvature kfac", (6.0, 8.0)),
        ("alps --curvature kfac --include mlp", (7.0, 9.0)),
    ]
    gblm = {"method": "gblm", "sparsity": 0.5, "alpha": 100.0}
    lines = [
        point(gblm, 9.0),
        point(gblm, 9.0, options={"--alpha": 100.0, "--alpha auto": {"windows": 16}}),
    ]
    write_points(tmp_path / "auto", lines)
    [sweep] = Sweep.read(tmp_path / "auto", "auto")
    assert sweep.rows == ("gblm", "gblm --alpha auto")
    lines = [
        point({"method": "wanda", "sparsity": 0.5}, 9.0),
        point({"method": "wanda", "pattern": "2:4"}, 9.5, options={"--mixed-patterns": True}),
    ]
    assert told(tmp_path / "columns", lines) == [("50 %", (9.0,)), ("2:4", (9.5,))]


def test_patterns_of_one_share_are_all_drawn(tmp_path: Path) -> None:
    """Above the same place of the axis."""
    lines = [
        *grid()[:3],
        point({"method": "wanda", "pattern": "2:4"}, 13.0),
        point({"method": "wanda", "pattern": "4:8"}, 12.0),
    ]
    write_points(tmp_path / "both", lines)
    [sweep] = Sweep.read(tmp_path / "both", "both")
    assert [(x.points, x.values) for x in sweep.series if x.is_pattern] == [((0.5, 0.5), (12, 13))]


def test_what_does_not_compare_is_not_one_sweep(tmp_path: Path) -> None:
    """Points of another text, or of another model, in the same folder."""
    text, other = {"--dataset": "stdlib"}, {"--dataset": "notes.txt"}
    model = {"name": "other", "digest": "ef" * 16}
    given: list[dict[str, Any]] = [{"measure": text}, {"measure": other}, {"model": model}]
    lines = [
        point(spec, value + n, **more)
        for spec, value in ((None, 8.0), ({"method": "wanda", "sparsity": 0.5}, 9.0))
        for n, more in enumerate(given)
    ]
    write_points(tmp_path / "mixed", lines)
    sweeps = Sweep.read(tmp_path / "mixed", "mixed")
    assert [x.title for x in sweeps] == ["mixed (1 of 3)", "mixed (2 of 3)", "mixed (3 of 3)"]
    assert [x.dense for x in sweeps] == [8.0, 9.0, 10.0]
    assert [x.series[0].values for x in sweeps] == [(9.0,), (10.0,), (11.0,)]


@pytest.mark.parametrize(
    "line", ["[]", "{", '{"format": 2}', '{"format": 1, "key": "a"}', "[" * 9999]
)
def test_a_line_that_is_no_point_is_named(tmp_path: Path, line: str) -> None:
    """With its number: it may be anybody's file."""
    write_points(tmp_path / "bad", [point(None, 9.0)])
    with (tmp_path / "bad" / "results.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(InputError, match="line 2: "):
        Sweep.read(tmp_path / "bad", "bad")
