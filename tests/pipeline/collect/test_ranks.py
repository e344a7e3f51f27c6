"""Ranks: one collection by several processes is N merged shards, to the byte."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from gradpipe import GradientStore, Shard, collect, collect_shard, merge, open_store
from tests.support.cases import collecting
from tests.support.forked import Processes
from tests.support.models import save_tiny
from tests.support.ranked import lines, run, start

SAMPLES = 9
LOST = "another rank has ended: run the same command again to go on\n"


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


def assert_close(one: GradientStore, other: GradientStore) -> None:
    """The same sums, up to the order of their addition in float32."""
    for layer in one.spec.layers:
        for statistic in one.spec.statistics:
            ours, theirs = (store.read_norms(layer, statistic) for store in (one, other))
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def wait_for(found: Callable[[], bool], pipes: Processes, ids: Sequence[int]) -> None:
    """Wait until something has happened, while all ranks live."""
    while not found():
        assert all(map(pipes.is_alive, ids)), [pipes.output(pid) for pid in ids]
        time.sleep(0.001)


@pytest.mark.parametrize(("count", "schedule"), [(2, "resident"), (4, "streamed")])
def test_ranks_are_merged_shards_to_the_byte(
    inputs: Path, tmp_path: Path, pipes: Processes, count: int, schedule: str
) -> None:
    """Either schedule; the first rank prints the table, nothing lies about, and it is done once."""
    ours = command(inputs, tmp_path / "ranks", "--schedule", schedule)
    table = run(pipes, count, *ours)
    assert str(SAMPLES) in table
    assert not (tmp_path / "ranks" / "partial").exists()
    store = open_store(tmp_path / "ranks")
    store.validate()
    assert store.digest == merged(inputs, tmp_path / "shards", count).digest
    if count == 2:
        assert run(pipes, count, *ours) == table
        lone = collect(collecting(inputs, tmp_path / "lone", num_samples=SAMPLES))
        assert_close(store, lone)


@pytest.mark.parametrize("count", [1, 2])
def test_any_number_of_ranks_goes_on_from_blocks_of_another(
    inputs: Path, tmp_path: Path, pipes: Processes, count: int
) -> None:
    """Two ranks are killed after a block; a lone process, or as many, end what it was."""
    store = tmp_path / "store"
    ours = command(inputs, store, "--schedule", "streamed")
    ids = start(pipes, 2, *ours)
    block = store / "partial" / "0-of-1" / "block-0001.json"
    wait_for(block.exists, pipes, ids)
    os.kill(ids[1], signal.SIGKILL)
    [first, second] = lines(pipes, ids)
    assert second[0] == -signal.SIGKILL
    assert first == (75, f"pipe: rank 0: {LOST}")
    assert block.exists()
    run(pipes, count, *ours)
    again, whole = open_store(store), merged(inputs, tmp_path / "shards", 2)
    assert not (store / "partial").exists()
    assert_close(again, whole)
    assert (again.digest == whole.digest) == (count == 2)


def test_snapshots_of_ranks_are_of_their_number(
    inputs: Path, tmp_path: Path, pipes: Processes
) -> None:
    """SIGTERM saves each rank's sums; another number is refused, and the same ends to the byte."""
    store = tmp_path / "store"
    ours = command(inputs, store, "--schedule", "resident", "--checkpoint-every", "1")
    ids = start(pipes, 2, *ours)
    saved = [store / "partial" / f"{rank}-of-2" for rank in range(2)]
    wait_for(lambda: all(list(x.glob("samples-*.json")) for x in saved), pipes, ids)
    for pid in ids:
        os.kill(pid, signal.SIGTERM)
    for rank, (code, said) in enumerate(lines(pipes, ids)):
        assert code == 75
        assert said.startswith(f"pipe: rank {rank}: ")
        assert said.endswith(": run the same command again to go on\n")
        assert said.count("\n") == 1
    told = "was begun as 2 shards or ranks, not 3: go on with that many"
    refused = lines(pipes, start(pipes, 3, *ours))
    assert [code for code, _ in refused] == [2, 2, 2]
    assert told in refused[0][1]
    assert [said for _, said in refused[1:]] == ["", ""]
    run(pipes, 2, *ours)
    assert open_store(store).digest == merged(inputs, tmp_path / "shards", 2).digest


def test_a_rank_that_hangs_is_given_up_in_time(
    inputs: Path, tmp_path: Path, pipes: Processes
) -> None:
    """A stopped rank is as a lost host: no connection closes; the other waits as long as told."""
    ours = command(inputs, tmp_path / "store", "--schedule", "streamed", "--rank-timeout", "2")
    ids = start(pipes, 2, *ours)
    wait_for((tmp_path / "store" / "partial" / "1-of-2.lock").exists, pipes, ids)
    os.kill(ids[1], signal.SIGSTOP)
    since = time.monotonic()
    code = pipes.wait(ids[0])
    assert time.monotonic() - since < 10
    os.kill(ids[1], signal.SIGKILL)
    said = pipes.output(ids[0])
    assert code == 75, said
    assert "pipe: rank 0: another rank did not answer in 2 s: run the same command again" in said


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("--seed", "rank 1 has --seed 5, rank 0 has 0"),
        ("model", "rank 1 has config.json's digest"),
        ("tensors", "rank 1 has tensors' digest"),
    ],
)
def test_a_rank_with_something_else_is_named(
    inputs: Path, tmp_path: Path, pipes: Processes, field: str, told: str
) -> None:
    """An option, another model: refused by all before any work, told by one."""
    other = tmp_path / "other" / "model"
    save_tiny("gpt2" if field == "model" else "llama", other, max_shard_size="40KB")
    (tmp_path / "other" / "text.txt").symlink_to(inputs / "text.txt")
    ours = command(inputs, tmp_path / "store")
    theirs = [*ours, "--seed", "5"] if field == "--seed" else command(other.parent, tmp_path / "s")
    ids = start(pipes, 2, *ours, others=theirs)
    (first, second) = lines(pipes, ids)
    assert first[0] == second[0] == 2
    assert told in first[1]
    assert first[1].count("\n") == 1
    assert second[1] == ""
    assert not (tmp_path / "store").exists()


def test_a_mistake_is_told_once(inputs: Path, tmp_path: Path, pipes: Processes) -> None:
    """Of all ranks the first says it; more ranks than samples, and --shard, are such."""
    for options, told in (
        (("--num-samples", "1"), "2 ranks: more than the 1 samples"),
        (("--shard", "0/2"), "--shard 0/2: the 2 ranks share the samples out"),
        (("--include", "nothing"), "--include nothing"),
        (
            ("--schedule", "resident", "--device-map", "auto"),
            "--device-map auto: it takes",
        ),
    ):
        [first, second] = lines(
            pipes, start(pipes, 2, *command(inputs, tmp_path / "store", *options))
        )
        assert first[0] == second[0] == 2
        assert told in first[1]
        assert second[1] == ""


@pytest.mark.slow
def test_torchrun_itself(inputs: Path, tmp_path: Path) -> None:
    """Two ranks, one of them killed at its first block, are started again and finish."""
    store = tmp_path / "store"
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, signal, sys\n"
        "from gradpipe.pipeline.collect.resume import ByBlocks\n"
        "from gradpipe.__main__ import main\n"
        "save = ByBlocks.save\n"
        "def dying(*arguments):\n"
        "    save(*arguments)\n"
        "    if os.environ['RANK'] + os.environ['TORCHELASTIC_RESTART_COUNT'] == '10':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "ByBlocks.save = dying\n"
        "main()\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "--max-restarts", "1", str(script)]
    ours = command(inputs, store, "--schedule", "streamed", "--overwrite")
    done = subprocess.run(
        [*torchrun, *map(str, ours)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert done.returncode == 0, done.stderr
    # The other rank sees that this one is gone, or torchrun's SIGTERM, whichever comes first.
    ways = ("another rank has ended", "stopped; every finished block is saved")
    assert any(f"pipe: rank 0: {way}: run the same command again" in done.stderr for way in ways)
    assert open_store(store).digest == merged(inputs, tmp_path / "shards", 2).digest
    assert json.loads((store / "zarr.json").read_text())
