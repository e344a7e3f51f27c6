"""Shards: independent jobs on one store, merged to the store of one run, in any grouping."""

import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gradpipe import (
    CollectConfig,
    DataConfig,
    GradientStore,
    InputError,
    Interrupted,
    Shard,
    StoreError,
    collect,
    collect_shard,
    merge,
)
from gradpipe.pipeline.collect import merge as merging
from gradpipe.store.lock import locked
from gradpipe.store.objects import CommitRecord
from tests.support.cases import collecting
from tests.support.forked import Processes
from tests.support.phases import interfere, raising
from tests.support.texts import write_text

SAMPLES = 9


def config(inputs: Path, store: Path, shard: str | None = None, **changes: Any) -> CollectConfig:
    """A small run, or one shard of it."""
    one = None if shard is None else Shard.parse(shard)
    return collecting(inputs, store, **{"num_samples": SAMPLES, "shard": one, **changes})


@pytest.fixture(scope="module")
def thirds(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Three stores, each with one shard of three: resident, streamed, resident."""
    folder = tmp_path_factory.mktemp("thirds")
    for index, schedule in enumerate(("resident", "streamed", "resident")):
        run = config(inputs, folder / str(index), f"{index}/3", schedule=schedule)
        assert collect_shard(run) is None
    return tuple(folder / str(index) for index in range(3))


def gathered(thirds: Sequence[Path], where: Path, *names: str) -> list[Path]:
    """Copies of the thirds, several in one folder where a name says so: `02`, `1`."""
    for name in names:
        for index in map(int, name):
            shutil.copytree(thirds[index], where / name, dirs_exist_ok=True)
    return [where / name for name in names]


def test_any_grouping_gives_the_same_bytes(thirds: Sequence[Path], tmp_path: Path) -> None:
    """Shards in one folder or in three, named in any order: one store, and nothing beside it."""
    digests = set()
    for number, names in enumerate((("012",), ("0", "1", "2"), ("21", "0"), ("1", "02"))):
        stores = gathered(thirds, tmp_path / str(number), *names)
        digests.add(merge(stores).digest)
        record = CommitRecord.from_bytes((stores[0] / "commit.json").read_bytes())
        files = {p.relative_to(stores[0]).as_posix() for p in stores[0].rglob("*") if p.is_file()}
        assert files == {*record.objects, "commit.json"}
        for other in stores[1:]:  # which stay as they are
            assert (other / "partial" / "calibration.json").is_file()
    assert len(digests) == 1


def test_stores_to_merge_may_be_given_as_text(thirds: Sequence[Path], tmp_path: Path) -> None:
    """One of them alone, too."""
    [whole] = gathered(thirds, tmp_path, "012")
    first, second = gathered(thirds, tmp_path / "parts", "02", "1")
    assert merge(str(whole)).digest == merge([str(first), str(second)]).digest


def test_a_missing_shard_is_named_and_the_merge_can_be_run_again(
    thirds: Sequence[Path], tmp_path: Path
) -> None:
    """Without one shard there is no store; nothing is lost or counted twice by trying."""
    first, second, third = gathered(thirds, tmp_path, "0", "1", "2")
    with pytest.raises(StoreError, match=r"lacks shard 1/3, 2/3"):
        merge([first])
    with pytest.raises(StoreError, match=r"lacks shard 2/3"):
        merge([first, second])
    digest = merge([first, second, third]).digest
    with pytest.raises(InputError, match="is complete"):
        merge([first, second])
    assert GradientStore.open(first).digest == digest


def test_an_unfinished_shard_is_named(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot of half a share is not a share; run again, it is."""
    store = tmp_path / "store"
    collect_shard(config(inputs, store, "0/2"))
    run = config(inputs, store, "1/2", checkpoint_every=2)
    with monkeypatch.context() as patched:
        interfere(patched, "accumulating", raising(Interrupted("stopped"), after=3))
        with pytest.raises(Interrupted):
            collect_shard(run)
    assert list((store / "partial" / "1-of-2").glob("*.json"))
    with pytest.raises(StoreError, match=r"lacks shard 1/2"):
        merge([store])
    collect_shard(run)
    assert merge([store]).spec.samples.num_samples == SAMPLES


def test_a_resident_snapshot_is_not_mistaken_for_streamed_sums(
    inputs: Path, thirds: Sequence[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that began resident and was finished streamed gives the sums of its whole share."""
    _, first, third = gathered(thirds, tmp_path, "012", "0", "2")
    run = config(inputs, tmp_path / "1", "1/3", checkpoint_every=1)
    with monkeypatch.context() as patched:
        interfere(patched, "snapshotting", raising(Interrupted("stopped")), after=True)
        with pytest.raises(Interrupted):
            collect_shard(run)
    collect_shard(replace(run, schedule="streamed", checkpoint_every=None))
    assert merge([first, run.store, third]).digest == merge([tmp_path / "012"]).digest


def test_a_doubled_shard_is_named(thirds: Sequence[Path], tmp_path: Path) -> None:
    """The same samples in two stores would count twice."""
    first, _ = gathered(thirds, tmp_path, "01", "12")
    with pytest.raises(InputError, match=r"shard 1/3 is both in .*01 and in .*12"):
        merge([first, tmp_path / "12"])


def test_shards_of_different_counts_are_refused(
    inputs: Path, thirds: Sequence[Path], tmp_path: Path
) -> None:
    """A half and two thirds are no whole, in one folder or in two."""
    first, second = gathered(thirds, tmp_path, "01", "2")
    for shard in ("0/2", None):
        run = config(inputs, first, shard)
        with pytest.raises(InputError, match=r"was begun as 3 shards"):
            collect(run) if shard is None else collect_shard(run)
    half = tmp_path / "half"
    collect_shard(config(inputs, half, "0/2"))
    with pytest.raises(InputError, match=r"shards of 2 and of 3"):
        merge([first, second, half])


def test_shards_of_different_samples_are_refused(
    inputs: Path, thirds: Sequence[Path], tmp_path: Path
) -> None:
    """Two jobs that drew from different texts measured different things."""
    (first,) = gathered(thirds, tmp_path, "01")
    text = write_text(tmp_path / "text.txt", repeats=30)
    run = config(inputs, tmp_path / "other", "2/3", data=DataConfig(name=str(text)))
    collect_shard(run)
    with pytest.raises(InputError, match="different samples"):
        merge([first, tmp_path / "other"])


def test_shards_survive_the_loss_of_the_samples_record(
    inputs: Path, thirds: Sequence[Path], tmp_path: Path
) -> None:
    """A record that vanished is no reason to throw finished shards away."""
    with pytest.raises(InputError, match="no stores to merge"):
        merge([])
    (first,) = gathered(thirds, tmp_path, "01")
    record = first / "partial" / "calibration.json"
    data = record.read_bytes()
    record.unlink()
    with pytest.raises(StoreError, match="has vanished"):
        collect_shard(config(inputs, first, "2/3"))
    record.write_bytes(data)
    collect_shard(config(inputs, first, "2/3"))
    merge([first])


def test_two_merges_do_not_get_in_each_others_way(
    thirds: Sequence[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that waited is told that the store is complete, and not to start anew."""
    (store,) = gathered(thirds, tmp_path, "012")
    real = locked

    @contextmanager
    def waited(path: Path, *, of: Path, wait: bool) -> Iterator[None]:
        monkeypatch.setattr(merging, "locked", real)
        merge([store])  # the other one, while this one waits
        with real(path, of=of, wait=wait):
            yield

    monkeypatch.setattr(merging, "locked", waited)
    with pytest.raises(InputError, match="is complete"):
        merge([store])
    GradientStore.open(store).validate()


def test_stores_of_different_settings_are_refused(
    inputs: Path, thirds: Sequence[Path], tmp_path: Path
) -> None:
    """Sums of two things do not add up to one."""
    (first,) = gathered(thirds, tmp_path, "01")
    collect_shard(config(inputs, tmp_path / "other", "2/3", statistics=("grad_l1",)))
    with pytest.raises(InputError, match="another statistics"):
        merge([first, tmp_path / "other"])
    with pytest.raises(InputError, match="no unfinished store"):
        merge([first, tmp_path])


def test_the_last_shard_finalizes(inputs: Path, thirds: Sequence[Path], tmp_path: Path) -> None:
    """With --finalize, who comes last merges; asked again, every shard finds the store there."""
    store, last = tmp_path / "store", None
    for index in (2, 0, 1):
        assert last is None
        last = collect_shard(config(inputs, store, f"{index}/3", finalize=True))
    assert last is not None
    assert last.digest == merge(gathered(thirds, tmp_path, "012")).digest
    again = collect_shard(config(inputs, store, "2/3", finalize=True))
    assert again is not None
    assert again.digest == last.digest


def arguments(inputs: Path, store: Path, *options: str) -> list[object]:
    """A `pipe collect-grads` with the settings of `config`."""
    source = ["collect-grads", inputs / "model", store, "--dataset", inputs / "text.txt"]
    settings = ["--seq-len", "16", "--encoding", "float32", "--schedule", "resident"]
    return [*source, *settings, *options]


def test_eight_at_once_one_of_them_killed(inputs: Path, tmp_path: Path, pipes: Processes) -> None:
    """Eight tasks of a Slurm array on one store, one killed and run again: the merged store."""
    store = tmp_path / "store"
    command = arguments(inputs, store, "--num-samples", "8", "--finalize")
    array = {"SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "1"}
    jobs = [pipes.start(*command, SLURM_ARRAY_TASK_ID=str(task), **array) for task in range(1, 9)]
    os.kill(jobs[3], signal.SIGSTOP)
    while not (store / "partial" / "calibration.json").exists():
        time.sleep(0.01)
    os.kill(jobs[3], signal.SIGKILL)
    codes = [pipes.wait(job) for job in jobs]
    assert codes == [0, 0, 0, -signal.SIGKILL, 0, 0, 0, 0], [*map(pipes.output, jobs)]
    assert not (store / "commit.json").exists()
    again = pipes.start(*command, SLURM_ARRAY_TASK_ID="4", **array)
    assert pipes.wait(again) == 0, pipes.output(again)
    GradientStore.open(store).validate()
    for index in range(8):
        collect_shard(config(inputs, tmp_path / "one", f"{index}/8", num_samples=8))
    assert GradientStore.open(store).digest == merge([tmp_path / "one"]).digest
    assert {path.name for path in store.iterdir()} == {
        *("zarr.json", "commit.json", "calibration", "layers")
    }


def test_a_second_collector_is_told_who_is_at_work(
    inputs: Path, tmp_path: Path, pipes: Processes
) -> None:
    """It stops, even to overwrite, and names host and process; the dead keep no lock."""
    store = tmp_path / "store"
    first = pipes.start(*arguments(inputs, store, "--num-samples", "3000"))
    while pipes.is_alive(first) and not (store / "partial" / "0-of-1.lock").exists():
        time.sleep(0.01)
    run = config(inputs, store, num_samples=3000)
    for second in (run, replace(run, overwrite=True, seed=1)):
        with pytest.raises(InputError, match=f"process {first} on {socket.gethostname()}"):
            collect(second)
    os.kill(first, signal.SIGKILL)
    assert pipes.wait(first) == -signal.SIGKILL
    assert (store / "partial" / "0-of-1.lock").exists()
    small = config(inputs, store, overwrite=True)
    assert collect(small).digest == collect(replace(small, store=tmp_path / "fresh")).digest


@pytest.mark.parametrize("text", ["3/3", "1", "a/2", "-1/2", "0/0", "1/2/3", "", "٣/٤x"])
def test_a_shard_is_one_of_n(text: str) -> None:
    """Anything but I/N with 0 ≤ I < N is refused."""
    with pytest.raises(InputError, match="expected I/N"):
        Shard.parse(text)
