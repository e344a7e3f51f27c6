"""Ranks: one collection by several processes is N merged shards, to the byte."""

from pathlib import Path

import numpy as np
import pytest

from gradpipe import GradientStore, Shard, collect_shard, merge, open_store
from tests.support.cases import collecting
from tests.support.forked import Processes
from tests.support.ranked import lines, run, start

SAMPLES = 9
SCHEDULES = ("resident", "streamed")


def command(inputs: Path, store: Path, *options: str) -> list[object]:
    """`collecting`, as a command."""
    paths = ["collect-grads", inputs / "model", store, "--dataset", inputs / "text.txt"]
    settings = ["--num-samples", SAMPLES, "--seq-len", "16", "--encoding", "float32"]
    return [*paths, *settings, *options]


def merged(inputs: Path, store: Path, count: int) -> GradientStore:
    """The store of so many shards."""
    for index in range(count):
        shard = Shard(index, count)
        collect_shard(collecting(inputs, store, num_samples=SAMPLES, shard=shard))
    return merge([store])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("count", [2, 4])
def test_ranks_are_merged_shards_to_the_byte(
    inputs: Path, tmp_path: Path, pipes: Processes, count: int, schedule: str
) -> None:
    """Either schedule; the first rank prints the table, and nothing lies about."""
    table = run(pipes, count, *command(inputs, tmp_path / "ranks", "--schedule", schedule))
    assert str(SAMPLES) in table
    assert not (tmp_path / "ranks" / "partial").exists()
    store = open_store(tmp_path / "ranks")
    store.validate()
    assert store.digest == merged(inputs, tmp_path / "shards", count).digest
