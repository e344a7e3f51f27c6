"""The benchmark of quality goes on where it was, and measures block by block what it says."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import quality
from benchmarks.measures import in_a_fork
from benchmarks.quality import BASELINE, DENSE, Bench, Protocol, Results
from gradpipe.pipeline.evaluate import evaluate_each
from gradpipe.store.lock import locked
from tests.support.models import VOCAB_SIZE, random_ids, save_tiny

TARGETS = ("0.5", "2:4")
STATISTICS = ("act_l2", "hessian")


def bench(folder: Path, results: Path | None = None, **changes: int) -> Bench:
    """A tiny model with token files, its store collected."""
    if not (folder / "model").exists():
        save_tiny("llama", folder / "model", **changes)
        for seed, name in enumerate(("calibration", "heldout")):
            np.save(folder / f"{name}.npy", random_ids(VOCAB_SIZE, 4, 16, seed=seed).numpy())
    protocol = Protocol(
        model=str(folder / "model"),
        calibration=str(folder / "calibration.npy"),
        heldout=str(folder / "heldout.npy"),
        seq_len=16,
        num_samples=4,
        dtype="auto",
        collect_dtype="float32",
    )
    protocol.collect(protocol.model, folder / "store", STATISTICS)
    return Bench(protocol=protocol, results=Results(results, protocol.told()), folder=folder)


def test_a_run_that_was_broken_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the file is not measured again, and the tables are those of one run."""
    whole = bench(tmp_path)
    whole.dense()
    whole.row("wanda", {"method": "wanda"}, TARGETS)
    asked: list[str] = []

    def breaks(models: Any, config: Any) -> Any:
        for number, metrics in enumerate(evaluate_each(models, config)):
            if number == 1:
                raise KeyboardInterrupt
            asked.append(metrics.model)
            yield metrics

    monkeypatch.setattr(quality, "evaluate_each", breaks)
    broken = bench(tmp_path, tmp_path / "results.json")
    broken.dense()
    with pytest.raises(KeyboardInterrupt):
        broken.row("wanda", {"method": "wanda"}, TARGETS)
    again = bench(tmp_path, tmp_path / "results.json")
    again.dense()
    again.row("wanda", {"method": "wanda"}, TARGETS)
    assert len(asked) == 1 + len(TARGETS)
    assert again.results.rows == whole.results.rows
    assert list(again.results.tables(TARGETS)) == list(whole.results.tables(TARGETS))


def test_the_first_block_behind_none_is_measured_dense(tmp_path: Path) -> None:
    """Of a model of one block, sequential statistics are the store's; a folder is used again."""
    one = bench(tmp_path, num_hidden_layers=1)
    one.dense()
    one.row("sparsegpt", {"method": "sparsegpt"}, ["2:4"])
    one.sequential("sparsegpt", "2:4")
    assert one.results.rows["sparsegpt"] == one.results.rows[BASELINE]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "sparsegpt-2-4-0").rglob("*")}
    del one.results.rows[BASELINE]
    one.sequential("sparsegpt", "2:4")
    assert one.results.rows["sparsegpt"] == one.results.rows[BASELINE]
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_nats_are_lost_to_the_dense_model(tmp_path: Path) -> None:
    """Logarithms of perplexities, less the dense one; shares against sequential SparseGPT."""
    results = Results(tmp_path / "results.json", {"seq_len": 16})
    results.add(DENSE, DENSE, math.e)
    results.add(BASELINE, "0.5", math.e**3)
    results.add("wanda", "0.5", math.e**2)
    _, lost, shares = results.tables(["0.5", "0.7"])
    assert "| wanda | 1.000 | – |" in lost
    assert f"| {BASELINE} | 2.000 | – |" in lost
    assert "| wanda | 50 | – |" in shares


def test_results_of_another_protocol_are_not_mixed_in(tmp_path: Path) -> None:
    """A longer window has another perplexity."""
    Results(tmp_path / "results.json", {"seq_len": 16}).add(DENSE, DENSE, 2.0)
    with pytest.raises(ValueError, match=r"seq_len.: 16.*expected.*seq_len.: 32"):
        Results(tmp_path / "results.json", {"seq_len": 32})


@pytest.mark.parametrize("taken", ["work", "results.json"])
def test_a_second_run_in_one_folder_or_file_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], taken: str
) -> None:
    """By one line that names who holds it, before anything is read or written."""
    work, results, path = tmp_path / "work", tmp_path / "results.json", tmp_path / taken
    with (
        locked(path.with_name(f".{taken}.lock"), of=path, wait=False),
        pytest.raises(ValueError, match="failed in its process"),
    ):
        in_a_fork(lambda: quality.main(model="nowhere", work=work, results=results))
    said = f"quality.py: {path} is being written by process {os.getpid()} on "
    assert capfd.readouterr().err.startswith(said)
    assert list(tmp_path.iterdir()) == []
