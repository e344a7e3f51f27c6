"""What only a GPU can show runs on any CPU as a toy, and says so if a result is wrong."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from benchmarks import gpu_agreement, gpu_check
from benchmarks.gpu_agreement import BFLOAT16_TIMES, FLOAT32_TOLERANCE, compared
from benchmarks.gpu_sparse import check_two_of_four
from benchmarks.measures import Measure
from gradpipe.stages.prune.mask import budget_mask

MEASURE = {"name", "value", "unit", "goal", "before", "is_met"}


def test_every_job_runs_and_writes_one_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU the device is the CPU: all agrees, and each figure is a finite number."""
    with pytest.raises(typer.Exit) as end:
        gpu_check.main(tmp_path / "results" / "toy.json", device="cpu", scale="toy")
    assert end.value.exit_code == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "results" / "toy.json").read_text())
    assert found.keys() == {
        "schema", "title", "date", "machine", "device", "versions", "jobs", "errors"
    }  # fmt: skip
    assert found["schema"] == 1
    assert found["errors"] == {}
    assert found["jobs"].keys() == gpu_check.JOBS.keys()
    for name, rows in found["jobs"].items():
        assert len({row["name"] for row in rows}) == len(rows) > 1, name
        for row in rows:
            assert row.keys() == MEASURE
            assert np.isfinite(row["value"]), row
            assert row["is_met"] == (None if row["goal"] is None else row["value"] <= row["goal"])
    table = capsys.readouterr().out
    assert all(f"| {row['name']} |" in table for rows in found["jobs"].values() for row in rows)


def test_a_job_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error is in the file, beside what it had found, and the exit code is 1."""

    def half(*_: object) -> object:
        yield Measure(name="before", value=1.0, unit="s")
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_check, "JOBS", {"half": half, "agreement": lambda *_: iter(())})
    with pytest.raises(typer.Exit) as end:
        gpu_check.main(tmp_path / "x.json", device="cpu", scale="toy", jobs="half,agreement")
    assert end.value.exit_code == 1
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["errors"] == {"half": "RuntimeError: no such kernel"}
    assert [row["name"] for row in found["jobs"]["half"]] == ["before"]
    assert [row["name"] for row in found["jobs"]["agreement"]] == ["this job"]


@pytest.mark.parametrize("statistic", ["grad_l1", "hessian"])
def test_a_statistic_that_is_off_in_one_layer_is_found(statistic: str) -> None:
    """A thousandth of one layer's norm is ten tolerances; a layer that lacks is infinitely far."""
    generator = np.random.default_rng(0)
    expected = {
        name: {layer: generator.random((8, 8), np.float32) for layer in "ab"}
        for name in ("grad_l1", "hessian")
    }
    allowed = dict.fromkeys(expected, FLOAT32_TOLERANCE)
    assert all(x.is_met for x in compared(expected, expected, "float32", allowed))
    wrong = {name: dict(layers) for name, layers in expected.items()}
    wrong[statistic]["b"] = wrong[statistic]["b"] * np.float32(1.001)
    measures = list(compared(wrong, expected, "float32", allowed))
    assert gpu_check.disagreements({"agreement": measures}) == [f"{statistic}, float32"]
    del wrong[statistic]["b"]
    measures = list(compared(wrong, expected, "float32", allowed))
    assert gpu_check.disagreements({"agreement": measures}) == [f"{statistic}, float32"]
    assert BFLOAT16_TIMES * 2**-8 > FLOAT32_TOLERANCE  # the wider one is for bfloat16


def test_a_solver_that_is_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights a little larger than the CPU's cost more than the tolerance."""
    right = gpu_agreement.solved
    answers = iter(range(1000))

    def wrong(*arguments: object) -> torch.Tensor:  # the first of each pair is the device's
        factor = 1.05 if next(answers) % 2 == 0 else 1.0
        return factor * right(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(gpu_agreement, "solved", wrong)
    measures = list(gpu_agreement.solvers((16, 32), torch.device("cpu")))
    assert len(gpu_check.disagreements({"agreement": measures})) == len(measures)


def test_a_mask_that_is_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight that differs is a disagreement."""
    right, calls = budget_mask, iter(range(1000))

    def wrong(*arguments: object) -> torch.Tensor:
        mask = right(*arguments).clone()  # type: ignore[arg-type]
        if next(calls) == 0:
            mask[0, 0] ^= True
        return mask

    monkeypatch.setattr("benchmarks.gpu_agreement.budget_mask", wrong)
    measures = list(gpu_agreement.masks((16, 32), torch.device("cpu")))
    assert gpu_check.disagreements({"agreement": measures}) == ["mask, output"]


def test_what_is_not_two_of_four_is_refused() -> None:
    """Three kept of four would be multiplied wrongly, without a word, by a GPU."""
    weight = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 3.0, 4.0]])
    check_two_of_four(weight)
    weight[0, 1] = 5.0
    with pytest.raises(ValueError, match="not 2:4"):
        check_two_of_four(weight)


def test_a_goal_is_what_may_be_at_most() -> None:
    """Met at the goal itself, by no NaN, and by nothing where there is none."""
    measure = Measure(name="x", value=1.0, unit="×", goal=1.0)
    assert measure.is_met
    assert not replace(measure, value=float("nan")).is_met
    assert replace(measure, goal=None).is_met is None
