"""SIGTERM to torchrun itself, as a scheduler sends it: every rank saves, the command goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradpipe import Shard, collect_shard, merge, open_store
from tests.support.cases import collecting
from tests.support.forked import Processes
from tests.support.ranked import run

SAMPLES, RANKS = 9, 2
# In mid-collection the first rank, once the second has all its samples, ends its parent, torchrun
SCRIPT = """
import os, signal, sys, time
from contextlib import contextmanager
from pathlib import Path
from gradpipe.__main__ import main
from gradpipe.pipeline.collect import worker
from gradpipe.pipeline.collect.resume import BySamples

usual, save, done = worker.stop_requests, BySamples.save, Path(sys.argv.pop(1))

@contextmanager
def noted():
    global stop_requested
    with usual() as stop_requested:
        yield stop_requested

def stopping(self, part, sums):
    if os.environ["RANK"] == "1" and part.index == 5:
        done.touch()
    if os.environ["RANK"] == "0" and part.index == 3:
        while not done.exists():
            time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGTERM)
        while not stop_requested():
            time.sleep(0.01)
    save(self, part, sums)

worker.stop_requests, BySamples.save = noted, stopping
main()
"""


@pytest.mark.slow
def test_torchrun_hands_sigterm_on_and_no_sample_is_lost(
    inputs: Path, tmp_path: Path, pipes: Processes
) -> None:
    """The rank at work saves, and so does the one that waits for it; the next run has the bytes.

    Snapshots are a minute apart otherwise: all that is saved is saved because of the signal.
    """
    store, script = tmp_path / "store", tmp_path / "stops.py"
    script.write_text(SCRIPT)
    ours: list[object] = ["collect-grads", inputs / "model", store]
    ours += ["--dataset", inputs / "text.txt", "--num-samples", SAMPLES, "--seq-len", "16"]
    ours += ["--encoding", "float32", "--schedule", "resident"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", str(RANKS), "--max-restarts", "3", str(script)]
    ended = subprocess.run(
        [*torchrun, str(tmp_path / "done"), *map(str, ours)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert ended.returncode == 1, ended.stderr  # torchrun's own, whatever the ranks end with
    assert "pipe: rank 0: stopped after 3 of 4 samples: run the same command" in ended.stderr
    assert "pipe: rank 1: " in ended.stderr
    saved = sorted(path.stem for path in (store / "partial").glob("*-of-2/*.json"))
    assert saved == ["samples-00000003", "samples-00000005"]
    run(pipes, RANKS, *ours)
    for index in range(RANKS):
        shard = Shard(index, RANKS)
        collect_shard(collecting(inputs, tmp_path / "alone", num_samples=SAMPLES, shard=shard))
    assert open_store(store).digest == merge([tmp_path / "alone"]).digest
