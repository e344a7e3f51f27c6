"""The streamed schedule: the resident one's numbers, one block at a time, resumable."""

from dataclasses import replace
from pathlib import Path

import pytest

from gradpipe import CollectConfig, DataConfig, collect
from tests.support.models import FAMILIES, save_tiny
from tests.support.texts import write_text

STATISTICS = ("grad_l1", "grad_l2", "grad_sum", "act_l2", "act_sum")


def config(root: Path, family: str = "llama", **options: object) -> CollectConfig:
    """A small run in `root`, streamed."""
    settings: dict[str, object] = {
        "model": str(save_tiny(family, root / "model")),
        "store": root / "streamed",
        "data": DataConfig(name=str(write_text(root / "text.txt"))),
        "num_samples": 5,
        "seq_len": 16,
        "batch_size": 2,
        "statistics": STATISTICS,
        "encoding": "float32",
        "schedule": "streamed",
    }
    return CollectConfig(**{**settings, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_is_resident_bit_for_bit(family: str, tmp_path: Path) -> None:
    """Every object of the store, of every family, has the same bytes under either schedule."""
    streamed = config(tmp_path, family)
    resident = replace(streamed, schedule="resident", store=tmp_path / "resident")
    assert collect(streamed).digest == collect(resident).digest


def test_nothing_but_the_store_is_left(tmp_path: Path) -> None:
    """No scratch, no snapshot, no lock, inside the store or in a scratch folder of one's own."""
    collect(config(tmp_path, scratch=tmp_path / "scratch"))
    assert not any((tmp_path / "scratch").iterdir())
    assert {p.name for p in (tmp_path / "streamed").iterdir()} == {
        *("zarr.json", "commit.json", "calibration", "layers")
    }


def test_the_head_is_collected_too(tmp_path: Path) -> None:
    """A layer outside the blocks has the same statistics under either schedule."""
    streamed = config(tmp_path, include=("lm_head",))
    resident = replace(streamed, schedule="resident", store=tmp_path / "resident")
    store = collect(streamed)
    assert "lm_head" in {layer.name for layer in store.spec.layers}
    assert store.digest == collect(resident).digest


def test_activations_alone_are_streamed_without_a_backward(tmp_path: Path) -> None:
    """Wanda's statistic, streamed, is the resident one's."""
    streamed = config(tmp_path, statistics=("act_l2",))
    resident = replace(streamed, schedule="resident", store=tmp_path / "resident")
    assert collect(streamed).digest == collect(resident).digest
