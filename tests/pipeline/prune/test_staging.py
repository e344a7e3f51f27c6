"""Outputs beside their final name: who may write them, and what a kill leaves."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from gradpipe import GradpipeError, InputError, PruneConfig, Shard, collect, prune
from gradpipe.errors import Interrupted
from gradpipe.pipeline.prune import run, staging
from gradpipe.pipeline.prune.files import write_file
from tests.support.cases import collecting, files_of, pruning, written
from tests.support.forked import Processes
from tests.support.models import save_tiny


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of several files, a store of it, and an output of one process."""
    folder = written(tmp_path_factory.mktemp("workplace"), max_shard_size="40KB")
    collect(collecting(folder, num_samples=3))
    prune(config(folder, folder / "whole"))
    return folder


def config(workplace: Path, out: Path, **changes: Any) -> PruneConfig:
    """Prune to one sparsity, or to what the changes say."""
    return pruning(workplace, out, **{"sparsities": (0.5,), **changes})


def names(folder: Path) -> set[str]:
    """What lies in a folder, hidden or not."""
    return {path.name for path in folder.iterdir()}


def test_a_second_prune_of_one_out_is_refused(
    workplace: Path, tmp_path: Path, pipes: Processes
) -> None:
    """Stopped in its middle, the first one's files are nobody else's to remove or to publish."""
    out = tmp_path / "out"
    targets = [word for i in range(1, 99) for word in ("--sparsity", f"{i / 100}")]
    pid = pipes.start("prune", workplace / "model", workplace / "store", out, *targets)
    while not (tmp_path / ".out.partial").exists() and pipes.is_alive(pid):
        time.sleep(0.001)
    os.kill(pid, signal.SIGSTOP)
    try:
        for run in (config(workplace, out), config(workplace, out, method="wanda")):
            with pytest.raises(InputError, match=f"out is being written by process {pid}"):
                prune(run)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert pipes.wait(pid) == 0, pipes.output(pid)
    assert len(names(out)) == 98
    assert names(tmp_path) == {"out"}


def test_a_rank_whose_staged_files_are_gone_was_interrupted(tmp_path: Path) -> None:
    """The first rank, when it is stopped, removes what others still write; they made no mistake."""
    made = staging.Staging(tmp_path / "out", lambda: None)
    with made.begun():
        with pytest.raises(Interrupted, match="another rank has ended"), made.joined():
            (made.folder / "model.safetensors").open("r+b")
        with pytest.raises(GradpipeError, match="cannot read"), made.joined():
            (tmp_path / "model" / "model.safetensors").open("rb")


def test_a_stopped_run_ends_as_stopped_whatever_another_rank_creates_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that appears as the first rank removes the folder is removed too, and no error."""
    made, remove, late = staging.Staging(tmp_path / "out", lambda: None), os.rmdir, iter([1, 2])

    def rmdir(path: Any, **options: Any) -> None:
        if next(late, None):
            (made.folder / "model.safetensors").touch()
        remove(path, **options)

    monkeypatch.setattr(os, "rmdir", rmdir)
    with pytest.raises(KeyboardInterrupt), made.begun():
        raise KeyboardInterrupt
    assert names(tmp_path) == set()


def test_a_rank_makes_no_folder_that_the_first_has_removed(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would lie beside OUT for ever, with nobody left to remove it."""

    def write_late(allocated: Any, file: str, folder: Path, *more: Any) -> Any:
        shutil.rmtree(folder)
        try:
            return write_file(allocated, file, folder, *more)
        finally:
            assert not folder.exists()

    monkeypatch.setattr(run, "write_file", write_late)
    with pytest.raises(GradpipeError, match=r"cannot write .*\.out\.partial/s0\.50: No such file"):
        prune(config(workplace, tmp_path / "out", sparsities=(0.5, 0.6)))


def test_a_lone_prune_leaves_unfinished_shards_alone(workplace: Path, tmp_path: Path) -> None:
    """Neither --overwrite nor another method throws away what shards have done."""
    prune(config(workplace, tmp_path / "out", shard=Shard(0, 2)))
    for options in ({}, {"overwrite": True}, {"method": "wanda"}):
        with pytest.raises(InputError, match="another prune command, in shards"):
            prune(config(workplace, tmp_path / "out", **options))
    prune(config(workplace, tmp_path / "out", shard=Shard(1, 2)))
    assert files_of(tmp_path / "out") == files_of(workplace / "whole")


@pytest.mark.parametrize("shard", [None, Shard(0, 1)])
def test_what_a_killed_prune_left_is_not_published(
    workplace: Path, tmp_path: Path, shard: Shard | None
) -> None:
    """A folder beside OUT without the shards' own mark is an earlier run's, and goes."""
    stray = tmp_path / ".out.partial" / "s0.70"
    stray.mkdir(parents=True)
    (stray / "model.safetensors").write_bytes(b"of another command")
    prune(config(workplace, tmp_path / "out", shard=shard))
    assert files_of(tmp_path / "out") == files_of(workplace / "whole")
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("killed_in", ["fsync", "_remove"])
def test_shards_killed_as_they_publish_publish_again(
    workplace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_in: str,
    *,
    overwrite: bool,
) -> None:
    """Before the renaming or after it, one shard more ends with the output and nothing else."""
    out = tmp_path / "out"
    if overwrite:
        prune(config(workplace, out, method="magnitude"))
    for index in range(2):
        prune(config(workplace, out, shard=Shard(index, 3), overwrite=overwrite))
    last = config(workplace, out, shard=Shard(2, 3), overwrite=overwrite)
    finish = staging.SharedStaging.publish

    def killed(places: Any) -> None:
        monkeypatch.setattr(staging, killed_in, interrupted)
        finish(places)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(staging.SharedStaging, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(last)
    monkeypatch.undo()
    prune(last)
    assert files_of(out) == files_of(workplace / "whole")
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_shards_that_come_late_leave_nothing(
    workplace: Path, tmp_path: Path, *, overwrite: bool
) -> None:
    """Once OUT is theirs there is nothing to do, whichever of them is run again."""
    for index in (1, 0, 0, 1):
        prune(config(workplace, tmp_path / "out", shard=Shard(index, 2), overwrite=overwrite))
    assert files_of(tmp_path / "out") == files_of(workplace / "whole")
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("step", [(staging.SharedStaging, "begun"), (run, "check_out")])
def test_a_shard_that_was_overtaken_begins_nothing(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: tuple[Any, str]
) -> None:
    """The others publish while it still verifies the store: it finds that under the lock.

    Or between its look at OUT's report and its look at OUT: that is no folder of strangers.
    """
    out = tmp_path / "out"
    prune(config(workplace, out, shard=Shard(0, 2)))
    real = getattr(*step)

    def overtaken(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(*step, real)
        prune(config(workplace, out, shard=Shard(1, 2)))
        return real(*arguments, **options)

    monkeypatch.setattr(*step, overtaken)
    assert prune(config(workplace, out, shard=Shard(0, 2))) == ()
    assert names(tmp_path) == {"out"}


def test_eight_shards_at_once_publish_one_output(
    workplace: Path, tmp_path: Path, pipes: Processes
) -> None:
    """More jobs than files, one of them killed and run again: one output, and nothing beside it."""
    out = tmp_path / "out"
    command = ["prune", workplace / "model", workplace / "store", out, "--sparsity", "0.5"]
    jobs = [pipes.start(*command, "--shard", f"{index}/8") for index in range(8)]
    os.kill(jobs[3], signal.SIGKILL)
    codes = [pipes.wait(pid) for pid in jobs]
    assert set(codes) <= {0, -signal.SIGKILL}, [pipes.output(pid) for pid in jobs]
    again = pipes.start(*command, "--shard", "3/8")
    assert pipes.wait(again) == 0, pipes.output(again)
    assert files_of(out) == files_of(workplace / "whole")
    assert names(tmp_path) == {"out"}


def test_damage_to_a_shards_file_is_found_and_can_be_mended(
    workplace: Path, tmp_path: Path
) -> None:
    """What does not read back as it was written is written again, not trusted for ever."""
    out = tmp_path / "out"
    prune(config(workplace, out, shard=Shard(0, 2)))
    path = next((tmp_path / ".out.partial").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(GradpipeError, match="run all shards again"):
        prune(config(workplace, out, shard=Shard(1, 2)))
    for index in range(2):
        prune(config(workplace, out, shard=Shard(index, 2)))
    assert files_of(out) == files_of(workplace / "whole")


def test_a_checkpoint_file_that_vanishes_is_named(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was to be read: making room would not help."""
    model = save_tiny("llama", tmp_path / "model", max_shard_size="40KB")
    real = staging.Beside.begin

    def vanishing(places: Any) -> None:
        real(places)
        next(model.glob("*.safetensors")).unlink()

    monkeypatch.setattr(staging.Beside, "begin", vanishing)
    with pytest.raises(GradpipeError, match=r"model-0000.*safetensors: No such file.*restore it"):
        prune(config(workplace, tmp_path / "out", model=str(model)))
    assert names(tmp_path) == {"model"}


def test_a_lock_is_not_left_for_a_finished_output(workplace: Path, tmp_path: Path) -> None:
    """Killed after the renaming, the same command has nothing to do but to say so."""
    prune(config(workplace, tmp_path / "out"))
    (tmp_path / ".out.lock").write_text("process 1 on nowhere")
    with pytest.raises(InputError, match="exists"):
        prune(config(workplace, tmp_path / "out"))
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("report", ["{}", "[]", "notes"])
def test_overwriting_is_for_outputs_alone(workplace: Path, tmp_path: Path, report: str) -> None:
    """A file that happens to be called pruning.json makes no folder ours to remove."""
    (tmp_path / "out").mkdir()
    for name, text in (("pruning.json", report), ("thesis.txt", "mine")):
        (tmp_path / "out" / name).write_text(text)
    with pytest.raises(InputError, match="no pruning wrote"):
        prune(config(workplace, tmp_path / "out", overwrite=True))
    assert names(tmp_path / "out") == {"pruning.json", "thesis.txt"}
