"""Interrupted collections: the same call again ends with the bytes of an uninterrupted one."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gradpipe import CollectConfig, GradpipeError, InputError, Interrupted, StoreError, collect
from gradpipe.stages.collect import estimate as planning
from gradpipe.store.shard import Shard
from gradpipe.store.snapshots import Snapshots
from tests.support.cases import collecting, written
from tests.support.forked import Processes
from tests.support.models import tiny_model, tiny_tokenizer
from tests.support.phases import interfere, raising
from tests.support.workplace import edit_weights

SCHEDULES = ("resident", "streamed")
STEPS = {"resident": "accumulating", "streamed": "streaming backward"}


class Crash(Exception):  # noqa: N818 (what happens, on purpose)
    """What stops a run in these tests."""


def config(inputs: Path, store: Path, **changes: Any) -> CollectConfig:
    """A small run: 7 samples in micro-batches of 2."""
    settings = {"num_samples": 7, "batch_size": 2, "encoding": "compact"}
    return collecting(inputs, store, **{**settings, **changes})


@pytest.fixture(scope="module")
def digest(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the store that is never interrupted."""
    return collect(config(inputs, tmp_path_factory.mktemp("whole") / "store")).digest


def counted(monkeypatch: pytest.MonkeyPatch, phase: str) -> list[None]:
    """One entry for each time that a phase runs from now on."""
    calls: list[None] = []
    interfere(monkeypatch, phase, lambda: calls.append(None))
    return calls


def interrupt(monkeypatch: pytest.MonkeyPatch, run: CollectConfig, calls: int, phase: str) -> None:
    """Run, and crash after so many calls of what runs in a phase."""
    with monkeypatch.context() as patched:
        interfere(patched, phase, raising(Crash(), after=calls))
        with pytest.raises(Crash):
            collect(run)


def snapshots(store: Path) -> list[str]:
    """Names of the committed snapshots."""
    return Snapshots(store, Shard(0, 1)).names()


def test_a_snapshot_is_gone_on_from(
    inputs: Path, tmp_path: Path, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a snapshot after each batch of 2, three batches are not computed a second time."""
    run = config(inputs, tmp_path / "store", checkpoint_every=2)
    interrupt(monkeypatch, run, 3, STEPS["resident"])
    assert snapshots(run.store) == ["samples-00000006"]
    count = counted(monkeypatch, STEPS["resident"])
    assert collect(run).digest == digest
    assert len(count) == 1


def test_snapshots_come_every_so_many_samples_and_replace_one_another(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot is a new folder, written once; the one before goes when it is committed."""
    run = config(inputs, tmp_path / "store", checkpoint_every=3)
    seen: list[str] = []
    folder = run.store / "partial" / "0-of-1"

    def look() -> None:
        seen.extend(sorted(path.name for path in folder.iterdir()))

    interfere(monkeypatch, "snapshotting", look, after=True)
    collect(run)
    assert seen == ["samples-00000004", "samples-00000004.json"]  # batches of 2: due after 4


def test_without_the_option_a_short_run_takes_no_snapshot(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starting over costs less than a snapshot in the first minute."""
    interrupt(monkeypatch, config(inputs, tmp_path / "store"), 3, STEPS["resident"])
    assert snapshots(tmp_path / "store") == []


@pytest.mark.parametrize("damage", ["object", "record", "half"])
def test_a_damaged_snapshot_is_ignored(
    inputs: Path, tmp_path: Path, digest: str, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """A changed byte, a broken record, or a snapshot without one: start over, same store."""
    run = config(inputs, tmp_path / "store", checkpoint_every=2)
    interrupt(monkeypatch, run, 2, STEPS["resident"])
    folder = run.store / "partial" / "0-of-1"
    record = folder / "samples-00000004.json"
    if damage == "object":
        path = next(p for p in (folder / "samples-00000004").rglob("c/0/0") if p.is_file())
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "record":
        record.write_bytes(b"{")
    else:
        record.unlink()
    assert collect(run).digest == digest


@pytest.mark.parametrize("damage", ["object", "record", "missing"])
def test_a_damaged_block_is_collected_again(
    inputs: Path, tmp_path: Path, digest: str, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """Streamed blocks are held against their records before they count as done."""
    run = config(inputs, tmp_path / "store", schedule="streamed")
    interrupt(monkeypatch, run, 1, STEPS["streamed"])
    assert snapshots(run.store) == ["block-0001"]
    path = run.store / "layers" / "model.layers.1.mlp.up_proj" / "act_l2" / "values" / "c" / "0"
    if damage == "record":
        path = run.store / "partial" / "0-of-1" / "block-0001.json"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    assert collect(run).digest == digest


@pytest.mark.parametrize("lost", ["all", "inputs-0001", "gradient-0001", "arguments"])
def test_lost_scratch_costs_time_and_nothing_else(
    inputs: Path,
    tmp_path: Path,
    digest: str,
    monkeypatch: pytest.MonkeyPatch,
    lost: str,
) -> None:
    """Without all or some of the activations between two runs, the store is the same."""
    scratch = tmp_path / "scratch"
    run = config(inputs, tmp_path / "store", schedule="streamed", scratch=scratch)
    interrupt(monkeypatch, run, 1, STEPS["streamed"])
    for path in scratch.glob("*/*"):
        if lost in ("all", path.name):
            path.unlink()
    assert collect(run).digest == digest
    assert not any(scratch.iterdir())


@pytest.mark.parametrize("anew", ["overwritten", "removed"])
def test_a_new_beginning_has_scratch_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: str
) -> None:
    """Activations of the same layers behind another embedding are not gone on from."""
    written(tmp_path)
    scratch = tmp_path / "scratch"
    run = collecting(tmp_path, schedule="streamed", scratch=scratch)
    interrupt(monkeypatch, run, 1, STEPS["streamed"])
    edit_weights(tmp_path / "model", lambda x: x["model.embed_tokens.weight"][:, 0].mul_(2))
    if anew == "removed":
        shutil.rmtree(run.store)
    found = collect(replace(run, overwrite=anew == "overwritten"))
    assert found.digest == collect(collecting(tmp_path, tmp_path / "other")).digest


@pytest.mark.parametrize("first", SCHEDULES)
def test_a_schedule_does_not_go_on_from_the_other_s_state(
    inputs: Path, tmp_path: Path, digest: str, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """`auto` may choose otherwise the second time: the store is the same all the same."""
    second = SCHEDULES[1 - SCHEDULES.index(first)]
    every = {"resident": 2, "streamed": None}
    run = config(inputs, tmp_path / "store", schedule=first, checkpoint_every=every[first])
    interrupt(monkeypatch, run, 1, STEPS[first])
    again = replace(run, schedule=second, checkpoint_every=every[second])
    assert collect(again).digest == digest


def test_other_settings_are_refused_by_name(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unfinished store is not gone on with by another command; --overwrite starts anew."""
    run = config(inputs, tmp_path / "store", checkpoint_every=2)
    interrupt(monkeypatch, run, 2, STEPS["resident"])
    with pytest.raises(InputError, match="begun with another statistics"):
        collect(replace(run, statistics=("grad_l1",)))
    with pytest.raises(InputError, match="begun with another encoding"):
        collect(replace(run, encoding="float32"))
    with pytest.raises(InputError, match=r"begun with another command.*--seed 1 .*now"):
        collect(replace(run, seed=1))
    with pytest.raises(InputError, match="begun with another model"):
        collect(replace(run, dtype="bfloat16"))
    fresh = collect(config(inputs, tmp_path / "fresh", seed=1))
    assert collect(replace(run, seed=1, overwrite=True)).digest == fresh.digest


@pytest.mark.parametrize("damage", ["zarr.json", "calibration/input_ids/c/0/0"])
def test_a_store_whose_samples_are_damaged_says_how_to_start_anew(
    inputs: Path, tmp_path: Path, digest: str, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """What every resumption reads is held against its digest; --overwrite is the remedy."""
    run = config(inputs, tmp_path / "store")
    interrupt(monkeypatch, run, 1, STEPS["resident"])
    (run.store / damage).write_bytes(b'{"zarr_format": 3, "node_type": "group"}')
    with pytest.raises(StoreError, match="overwrite it, to start anew"):
        collect(run)
    assert collect(replace(run, overwrite=True)).digest == digest


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_nan_stops_with_the_layer_s_name(inputs: Path, tmp_path: Path, schedule: str) -> None:
    """The layer whose output is the first that is not a number is named; nothing is committed."""
    broken = tiny_model("llama")
    broken.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 3] = float("nan")
    broken.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    run = config(inputs, tmp_path / "store", model=str(tmp_path / "model"), schedule=schedule)
    with pytest.raises(GradpipeError, match=r"layer model\.layers\.1\.mlp\.up_proj"):
        collect(run)
    assert not (run.store / "commit.json").exists()


def test_stopped_while_the_store_is_written_all_samples_are_saved(
    inputs: Path, tmp_path: Path, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding a large model takes minutes; a signal in them costs no pass over the samples."""
    run = config(inputs, tmp_path / "store")
    with monkeypatch.context() as patched:
        interfere(patched, "writing a layer", lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted, match="all samples are saved: run the same command again"):
            collect(run)
    assert len(snapshots(run.store)) == 1
    count = counted(monkeypatch, STEPS["resident"])
    assert collect(run).digest == digest
    assert len(count) == 0


def test_auto_goes_on_as_it_was_begun(
    inputs: Path, tmp_path: Path, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less free memory than the first time is no reason to throw a snapshot away."""
    run = config(inputs, tmp_path / "store", schedule="auto", checkpoint_every=2)
    interrupt(monkeypatch, run, 3, STEPS["resident"])
    monkeypatch.setattr(planning, "free_bytes", lambda _: 0)
    count = counted(monkeypatch, STEPS["resident"])
    assert collect(run).digest == digest
    assert len(count) == 1
    assert collect(replace(run, store=tmp_path / "other")).digest == digest
    assert len(count) == 1  # which is streamed


@pytest.mark.parametrize("changes", [{}, {"statistics": ("act_l2",)}])
def test_a_store_that_was_finished_meanwhile_is_taken_if_it_is_this_command_s(
    inputs: Path,
    tmp_path: Path,
    digest: str,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    """Another process was faster, with the same command or another one."""
    run = config(inputs, tmp_path / "store")

    def finish() -> None:
        monkeypatch.undo()
        collect(replace(run, **changes))

    interfere(monkeypatch, "tokenising", finish)
    if changes:
        with pytest.raises(InputError, match="exists and is complete"):
            collect(run)
    else:
        assert collect(run).digest == digest


def test_a_run_that_overwrites_goes_on_without_the_option(
    inputs: Path, tmp_path: Path, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--overwrite` again would start anew, so the advice is to leave it out."""
    run = config(inputs, tmp_path / "store", checkpoint_every=2)
    with monkeypatch.context() as patched:
        interfere(patched, STEPS["resident"], lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted, match="run the same command again, without --overwrite"):
            collect(replace(run, overwrite=True))
    assert snapshots(run.store)
    assert collect(run).digest == digest


def test_a_block_that_vanishes_is_not_left_out(
    inputs: Path, tmp_path: Path, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A streamed store is never declared complete without a layer; run again, it has it."""
    run = config(inputs, tmp_path / "store", schedule="streamed")
    interrupt(monkeypatch, run, 1, STEPS["streamed"])
    block = run.store / "partial" / "0-of-1" / "block-0001.json"
    with monkeypatch.context() as patched:
        interfere(patched, "finishing from blocks", block.unlink)
        with pytest.raises(GradpipeError, match=r"layers\.1\..* has vanished"):
            collect(run)
    assert collect(run).digest == digest


def start(pipes: Processes, inputs: Path, store: Path, every: int) -> int:
    """A real `pipe collect-grads` of 300 samples, once it has written a snapshot of its own."""
    before = snapshots(store)
    source = ["collect-grads", inputs / "model", store, "--dataset", inputs / "text.txt"]
    settings = ["--num-samples", "300", "--seq-len", "16", "--schedule", "resident"]
    often = ["--batch-size", every, "--checkpoint-every", every]
    pid = pipes.start(*source, *settings, *often)
    while snapshots(store) in ([], before) and pipes.is_alive(pid):
        time.sleep(0.005)
    return pid


def test_signals_save_and_say_how_to_go_on(inputs: Path, tmp_path: Path, pipes: Processes) -> None:
    """SIGINT and SIGTERM end with 75 and a snapshot, and the same command finishes the store."""
    store = tmp_path / "store"
    done = []
    for number in (signal.SIGINT, signal.SIGTERM):
        pid = start(pipes, inputs, store, 10)
        os.kill(pid, number)
        assert pipes.wait(pid) == 75, pipes.output(pid)
        assert "run the same command again to go on" in pipes.output(pid).splitlines()[-1]
        assert len(pipes.output(pid).splitlines()) == 2  # the schedule, and this
        done.append(int(snapshots(store)[0].removeprefix("samples-")))
    assert 0 < done[0] < done[1] < 300
    whole = config(inputs, tmp_path / "whole", num_samples=300, batch_size=10)
    assert collect(replace(whole, store=store)).digest == collect(whole).digest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_libraries_load_is_one_line(number: signal.Signals) -> None:
    """Nothing has begun by then, and the command says no more than that it was stopped."""
    with subprocess.Popen(
        [sys.executable, "-m", "gradpipe", "eval", "embedded", "--dataset", "stdlib"],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while "libtorch" not in maps.read_text():
            time.sleep(0.005)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75
    assert stderr == "pipe: interrupted: run the same command again\n"


def test_a_second_signal_quits_at_once(inputs: Path, tmp_path: Path, pipes: Processes) -> None:
    """Two signals that come during one micro-batch: nothing more is computed or saved."""
    store = tmp_path / "store"
    pid = start(pipes, inputs, store, 100)
    os.kill(pid, signal.SIGSTOP)
    before = snapshots(store)
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGCONT)
    assert pipes.wait(pid) == 75, pipes.output(pid)
    assert "run the same command again" in pipes.output(pid)
    assert snapshots(store) == before
