"""The plan of a collection: from the config alone, and the schedule that it chooses."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gradpipe import CollectConfig, DataConfig, collect, plan
from gradpipe.stages import plan as planning
from gradpipe.store.schema import STATISTICS
from tests.models import FAMILIES, save_tiny
from tests.texts import write_text


def config(root: Path, family: str = "llama", **options: object) -> CollectConfig:
    """A small run in `root`, of every statistic."""
    settings: dict[str, object] = {
        "model": str(save_tiny(family, root / "model")),
        "store": root / "store",
        "data": DataConfig(name=str(write_text(root / "text.txt"))),
        "num_samples": 5,
        "seq_len": 16,
        "statistics": STATISTICS,
        "encoding": "float32",
    }
    return CollectConfig(**{**settings, **options})  # type: ignore[arg-type]


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
    assert planned.store_bytes == 4 * numbers
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
