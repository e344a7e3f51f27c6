"""The plan of a collection: from the config alone, and the schedule that it chooses."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradpipe import CollectConfig, DataConfig, Shard, collect, plan
from gradpipe.stages.collect import estimate as planning
from gradpipe.store.statistics import STATISTICS
from tests.support.cases import collecting, written
from tests.support.models import FAMILIES


def config(root: Path, family: str = "llama", **changes: Any) -> CollectConfig:
    """A small run in `root`, of every statistic."""
    written(root, family)
    settings = {"num_samples": 5, "statistics": STATISTICS, "schedule": "auto"}
    return collecting(root, **{**settings, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_needs_no_more_than_the_config(family: str, tmp_path: Path) -> None:
    """Without a weight in the folder, every layer's statistics are counted, to the number."""
    run = config(tmp_path, family)
    store = collect(run)
    for path in (tmp_path / "model").iterdir():
        if path.name != "config.json":
            path.unlink()
    planned = plan(run)
    numbers = sum(
        math.prod(layer.statistic_shape(name))
        for layer in store.spec.layers
        for name in layer.own(STATISTICS)
    )
    count = sum(len(layer.own(STATISTICS)) for layer in store.spec.layers)
    assert planned.store_bytes == 4 * numbers + planning.METADATA_BYTES * count
    files = [path for path in run.store.rglob("*") if path.is_file()]
    assert planned.store_bytes > 0.9 * sum(path.stat().st_size for path in files)
    assert planned.num_parameters >= sum(math.prod(layer.shape) for layer in store.spec.layers)


def test_a_file_of_tokens_has_windows_of_its_own(tmp_path: Path) -> None:
    """What a collection would take is counted for the windows that it would have."""
    np.save(tmp_path / "ids.npy", np.zeros((8, 24), dtype=np.int32))
    data = DataConfig(name=str(tmp_path / "ids.npy"))
    run = config(tmp_path, data=data, seq_len=None)
    assert (
        plan(run).flops
        == plan(replace(run, seq_len=24)).flops
        < plan(replace(run, seq_len=64)).flops
    )


def test_resident_where_it_fits_with_a_margin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` is streamed as soon as the free memory is not a fifth more than is needed."""
    run = config(tmp_path)
    needed = plan(run).resident_bytes
    for free, schedule in ((1.19 * needed, "streamed"), (1.21 * needed, "resident")):
        monkeypatch.setattr(planning, "free_bytes", lambda _, free=free: int(free))
        planned = plan(run)
        assert planned.schedule == schedule
        assert "are free" in planned.reason


@pytest.mark.parametrize(
    ("groups", "files", "free"),
    [
        ("0::/job/step", {"job/memory.max": "9000", "job/memory.current": "2000"}, 7000),
        (
            "0::/job/step",
            {
                "job/memory.max": "9000",
                "job/memory.current": "2000",
                "job/step/memory.max": "max",
                "job/step/memory.current": "1000",
            },
            7000,
        ),
        (
            "4:memory:/job",
            {
                "memory/job/memory.limit_in_bytes": "5000",
                "memory/job/memory.usage_in_bytes": "6000",
            },
            0,
        ),
        ("3:cpu,cpuacct:/job", {"cpu/job/memory.max": "1", "cpu/job/memory.current": "0"}, None),
    ],
)
def test_a_job_s_own_limit_counts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    groups: str,
    files: dict[str, str],
    free: int | None,
) -> None:
    """What Slurm or a container allows may be less than what the machine has, at any level."""
    (tmp_path / "self").write_text(f"{groups}\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(planning, "_GROUPS", (tmp_path / "self", tmp_path))
    machine = planning.free_bytes(torch.device("cpu"))
    assert machine == free if free is not None else machine > 10_000


def test_a_shard_takes_its_share(tmp_path: Path) -> None:
    """Operations and scratch are of the samples that are the shard's."""
    run = config(tmp_path, schedule="streamed", num_samples=8)
    whole, quarter = plan(run), plan(replace(run, shard=Shard(1, 4)))
    assert quarter.flops * 4 == whole.flops
    assert quarter.scratch_bytes * 4 == whole.scratch_bytes
    assert quarter.store_bytes == whole.store_bytes


def test_streaming_needs_no_more_for_more_blocks(tmp_path: Path) -> None:
    """By the plan, too, memory on the device is independent of the depth; scratch is not."""
    run = config(tmp_path, schedule="streamed")
    shallow = plan(run)
    path = tmp_path / "model" / "config.json"
    text = path.read_text()
    assert '"num_hidden_layers": 2' in text
    path.write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 24'))
    deep = plan(run)
    assert deep.device_bytes == shallow.device_bytes
    assert deep.scratch_bytes == (24 + 3) * shallow.scratch_bytes // (2 + 3)
    assert deep.resident_bytes > shallow.resident_bytes
