"""Broken off and run again, or shared out and merged: the store of one uninterrupted run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradpipe import DataConfig, GradientStore, GradpipeError, Shard, collect, collect_shard, merge
from tests.support.cases import EVERY, LLAMA, MECHANISMS, MIXTRAL, TOKENS, VIT, Case, Shelf
from tests.support.phases import interfere, raising

STEPS = {"resident": "accumulating", "streamed": "streaming backward"}


@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize("schedule", STEPS)
@pytest.mark.parametrize("case", [LLAMA, MIXTRAL, VIT], ids=str)
def test_a_run_that_broke_off_needs_no_data_to_end_as_if_it_had_not(
    case: Case,
    schedule: str,
    calls: int,
    tmp_path: Path,
    shelf: Shelf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped after a batch, or a block, the same call gives the same store, data gone or not."""
    run = case.collecting(
        case.make(tmp_path), statistics=EVERY, schedule=schedule, **often(schedule)
    )
    with monkeypatch.context() as patched:
        interfere(patched, STEPS[schedule], raising(GradpipeError("crash"), after=calls))
        with pytest.raises(GradpipeError, match="crash"):
            collect(run)
    for file in (tmp_path / case.data).rglob("*.png") if case.is_images else [tmp_path / case.data]:
        file.write_bytes(b"")
    assert collect(run).digest == shelf.store(case).digest
    assert {path.name for path in run.store.iterdir()} == {
        *("zarr.json", "commit.json", "calibration", "layers")
    }


def often(schedule: str) -> dict[str, Any]:
    """A snapshot after each batch, where there are snapshots."""
    return {"checkpoint_every": 2} if schedule == "resident" else {}


def assert_sums_of(merged: GradientStore, whole: GradientStore) -> None:
    """The same layers, samples and counts; sums to float32's rounding of a few more sums."""
    assert merged.spec == whole.spec
    merged.validate()
    for layer in whole.spec.layers:
        for statistic, item in merged.read(layer, whole.spec.statistics).items():
            expected = whole.read(layer, [statistic])[statistic]
            assert item.spec == expected.spec
            norms, exact = merged.read_norms(layer, statistic), whole.read_norms(layer, statistic)
            floor = 1e-6 * float(np.abs(exact).max())
            np.testing.assert_allclose(norms, exact, rtol=1e-5, atol=floor)


@pytest.mark.parametrize("schedule", STEPS)
@pytest.mark.parametrize("case", MECHANISMS, ids=str)
def test_merged_shards_are_one_run(case: Case, schedule: str, shelf: Shelf, tmp_path: Path) -> None:
    """Three jobs on one store give the sums of one."""
    run = case.collecting(shelf.root(case), tmp_path / "store", statistics=EVERY, schedule=schedule)
    for index in range(3):
        collect_shard(replace(run, shard=Shard(index, 3)))
    assert_sums_of(merge([run.store]), shelf.store(case))


def test_shards_that_missed_some_experts_merge_to_one_run(shelf: Shelf, tmp_path: Path) -> None:
    """Where a shard's two tokens reached only some of them, and some were never reached."""
    np.save(tmp_path / "ids.npy", TOKENS[:3, :2].numpy())
    run = replace(
        MIXTRAL.collecting(shelf.root(MIXTRAL), tmp_path / "store", statistics=EVERY),
        data=DataConfig(name=str(tmp_path / "ids.npy")),
        num_samples=3,
        seq_len=2,
        batch_size=1,  # gradients of a few tokens vanish: another batch would round them otherwise
    )
    whole = collect(replace(run, store=tmp_path / "whole"))
    counts = [whole.read(x, ["act_l2"])["act_l2"].spec.num_tokens for x in whole.spec.layers]
    assert min(counts) < 3  # so that one of three shards saw none
    for index in range(3):
        collect_shard(replace(run, shard=Shard(index, 3)))
    assert_sums_of(merge([run.store]), whole)
