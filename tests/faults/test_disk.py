"""Disks that are full, read-only, or lose a file: one clear line, and the store goes on after."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gradpipe import CollectConfig, GradpipeError, ReportConfig, collect, prune, report
from gradpipe.errors import InputError, StoreError
from tests.support.cases import collecting, pruning, written
from tests.support.models import save_tiny
from tests.support.phases import interfere

SCHEDULES = ("resident", "streamed")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and the store that an untroubled run writes."""
    folder = written(tmp_path_factory.mktemp("inputs"))
    collect(config(folder, folder / "store"))
    return folder


def config(inputs: Path, store: Path, **changes: Any) -> CollectConfig:
    """A small run."""
    settings: dict[str, Any] = {"num_samples": 6, "batch_size": 2, "encoding": "compact"}
    if changes.get("schedule") != "streamed":
        settings["checkpoint_every"] = 2
    return collecting(inputs, store, **{**settings, **changes})


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KiB of its own, in memory; skips where this process may not mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with mounted(folder, "size=300k"):
        yield folder


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A tmpfs at `folder`."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if mount is None or umount is None:
        pytest.skip("no mount command")
    command = [mount, "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"may not mount a tmpfs: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run([umount, "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    """Change a mounted tmpfs."""
    mount = shutil.which("mount")
    assert mount is not None  # or there would be no disk
    subprocess.run([mount, "-o", f"remount,{options}", str(folder)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Take all space of a disk but a few KiB; returns the file that takes it."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    with ballast.open("r+b") as file:
        file.truncate(max(0, ballast.stat().st_size - leave * 1024))
    return ballast


def digest(inputs: Path) -> str:
    """Of the store that an untroubled run writes."""
    return collect(config(inputs, inputs / "store")).digest


def check_line(error: GradpipeError) -> None:
    """A failure of the machine, told in one line that says what to do."""
    assert type(error) is GradpipeError  # exit code 1
    assert "\n" not in str(error)
    assert "run the same command again" in str(error)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("leave", [0, 8, 40, 100])
def test_a_full_disk(inputs: Path, disk: Path, schedule: str, leave: int) -> None:
    """Wherever the space ends, the line says so; with room again, the same call finishes."""
    ballast = fill(disk, leave)
    run = config(inputs, disk / "store", schedule=schedule)
    with pytest.raises(GradpipeError, match="No space left on device") as caught:
        collect(run)
    check_line(caught.value)
    ballast.unlink()
    remount(disk, "size=8m")
    assert collect(run).digest == digest(inputs)


def test_a_full_disk_for_scratch(inputs: Path, tmp_path: Path, disk: Path) -> None:
    """A scratch folder of its own fills up: the same, and the store is elsewhere."""
    ballast = fill(disk, 4)
    run = config(inputs, tmp_path / "store", schedule="streamed", scratch=disk / "scratch")
    with pytest.raises(
        GradpipeError, match=r"scratch.*No space left on device.*--scratch"
    ) as caught:
        collect(run)
    check_line(caught.value)
    ballast.unlink()
    assert collect(run).digest == digest(inputs)


def test_a_full_disk_for_a_checkpoint(inputs: Path, disk: Path) -> None:
    """Pruning leaves nothing on a full disk, and works once there is room."""
    ballast = fill(disk, 60)
    run = pruning(inputs, disk / "deep" / "out")
    with pytest.raises(GradpipeError, match="No space left on device") as caught:
        prune(run)
    check_line(caught.value)
    assert [path.name for path in disk.iterdir()] == ["ballast"]
    ballast.unlink()
    prune(run)


def test_a_full_disk_for_a_page(inputs: Path, disk: Path) -> None:
    """A report says which file it was, and leaves nothing."""
    fill(disk, 0)
    run = ReportConfig(out=(str(inputs / "store"),), html=disk / "report.html")
    with pytest.raises(GradpipeError, match=r"--html .*report\.html: No space left on device") as x:
        report(run)
    check_line(x.value)
    assert [path.name for path in disk.iterdir()] == ["ballast"]


def test_more_targets_than_open_files(inputs: Path, tmp_path: Path) -> None:
    """The line says what is too many, and nothing is left."""
    run = pruning(inputs, tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len([*Path("/proc/self/fd").iterdir()])
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 30, limits[1]))
    try:
        with pytest.raises(GradpipeError, match=r"Too many open files.*fewer targets") as caught:
            prune(replace(run, sparsities=tuple(x / 100 for x in range(1, 60))))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    check_line(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_disk(inputs: Path, disk: Path) -> None:
    """Nothing can be begun there; writable again, it is."""
    remount(disk, "ro")
    run = config(inputs, disk / "store")
    target = pruning(inputs, disk / "out")
    for call in (lambda: collect(run), lambda: prune(target)):
        with pytest.raises(GradpipeError, match="Read-only file system") as caught:
            call()
        assert type(caught.value) is GradpipeError
        assert "\n" not in str(caught.value)
    remount(disk, "rw,size=8m")
    assert collect(run).digest == digest(inputs)


def test_a_file_that_vanishes(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing input is a line that names it; with the file back, the same call finishes."""
    run = config(inputs, tmp_path / "store", model=str(tmp_path / "model"))
    save_tiny("llama", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    away = weights.rename(tmp_path / "away")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        collect(run)
    away.rename(weights)
    root = run.store / "zarr.json"
    with monkeypatch.context() as patched:
        interfere(patched, "accumulating", lambda: root.unlink(missing_ok=True))
        expected = collect(run)  # what is in memory is written again at the end
    assert expected.digest == digest(inputs)


@pytest.mark.parametrize("key", ["zarr.json", "calibration/input_ids/c/0/0"])
def test_an_object_that_vanishes_from_a_finished_store(
    inputs: Path, tmp_path: Path, key: str
) -> None:
    """It is named, with what to do; collecting anew over it gives the store again."""
    run = config(inputs, tmp_path / "store")
    store = collect(run)
    (run.store / key).unlink()
    with pytest.raises(StoreError, match=f"object {key} is missing"):
        store.validate()
    assert collect(replace(run, overwrite=True)).digest == store.digest


def test_a_scratch_file_that_vanishes_meanwhile(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that names it; the same call computes it again."""
    run = config(inputs, tmp_path / "store", schedule="streamed", scratch=tmp_path / "scratch")

    def vanish() -> None:
        for path in (tmp_path / "scratch").glob("*/inputs-0001"):
            path.unlink()

    with monkeypatch.context() as patched:
        interfere(patched, "streaming backward", vanish)
        with pytest.raises(GradpipeError, match="inputs-0001: No such file") as caught:
            collect(run)
    check_line(caught.value)
    assert collect(run).digest == digest(inputs)
