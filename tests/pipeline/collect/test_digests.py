"""The digests of a collection's weights: taken once, and held against what each worker loads."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gradpipe import CollectConfig, InputError, Shard, collect, collect_shard, merge
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.model import layers
from gradpipe.store.objects import digest
from tests.support.cases import collecting, written
from tests.support.models import tiny_model

SCHEDULES = ("resident", "streamed")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A model and a text."""
    return written(tmp_path)


def config(root: Path, **options: Any) -> CollectConfig:
    """A small run in `root`."""
    return collecting(root, **{"num_samples": 3, "schedule": "auto", **options})


def save_other_weights(root: Path) -> None:
    """The same config.json, names and shapes; one weight is another."""
    model = tiny_model("llama")
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 3] += 1
    model.save_pretrained(root / "model")


def test_shards_read_the_weights_for_digests_once(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three shards the first hashes each tensor; the digests are the tensors'."""
    read: Counter[str] = Counter()

    def counted(data: Any) -> str:
        read["digest"] += 1
        return digest(data)

    monkeypatch.setattr(layers, "digest", counted)
    for index in range(3):
        collect_shard(config(root, shard=Shard(index, 3), schedule="resident"))
    checkpoint = Checkpoint.open(str(root / "model"))
    store = merge([root / "store"])
    assert read["digest"] == len(store.spec.layers)
    for layer in store.spec.layers:
        assert layer.digest == digest(checkpoint.read_bytes(layer.weight_key))


def test_a_resident_shard_reads_no_file_for_them(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it holds the digests against is in memory already."""
    collect_shard(config(root, shard=Shard(0, 2), schedule="resident"))
    monkeypatch.setattr(Checkpoint, "read_bytes", None)
    collect_shard(config(root, shard=Shard(1, 2), schedule="resident"))
    assert merge([root / "store"]).spec.samples.num_samples == 3


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_shard_of_other_weights_is_refused(root: Path, schedule: str, dtype: str) -> None:
    """Whatever the weights are computed in, sums of two models are not added."""
    collect_shard(config(root, shard=Shard(0, 2), schedule=schedule, dtype=dtype))
    save_other_weights(root)
    run = config(root, shard=Shard(1, 2), schedule=schedule, dtype=dtype)
    with pytest.raises(InputError, match=r"the weights of model\.layers\.1\.mlp\.up_proj are not"):
        collect_shard(run)


def test_a_finished_store_is_not_taken_for_other_weights(root: Path) -> None:
    """The same command on a checkpoint that has changed is another collection."""
    collect(config(root))
    save_other_weights(root)
    with pytest.raises(InputError, match="exists and is complete"):
        collect(config(root))
