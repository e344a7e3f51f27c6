"""Stores copied to and from S3, over a line that breaks, by hosts that die.

The server is moto in a process of its own; between it and the clients is a proxy that fails.
"""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import s3fs

from gradpipe import GradientStore, GradpipeError, InputError, StoreError, prune
from gradpipe.store.objects import COMMIT_KEY, COPY_KEY
from tests.support.cases import files_of, pruning
from tests.support.far import BUCKET, OBJECT, ROOT, complaint, copied, objects_in, url
from tests.support.faulty import Proxy, nothing, twice
from tests.support.workplace import run_pipe

# A line that breaks.


@pytest.mark.usefixtures("impatient")
def test_a_copy_arrives_whole_over_a_line_that_breaks(
    far: Any, line: Proxy, near: Path, tmp_path: Path
) -> None:
    """Up and down again, with two faults for every object: the same bytes, and nothing beside."""
    line.reset(twice)
    copied(near, url())
    assert objects_in(far) == files_of(near)
    up = set(line.faults)
    line.reset(twice)
    copied(url(), tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(near)
    assert up | set(line.faults) == {
        "500",
        "slow",
        "cut",
        "truncated",
        "unheard",
        "time-out",
        "503",
    }


@pytest.mark.usefixtures("impatient")
def test_pruning_over_a_line_that_breaks_gives_the_same_bytes(
    line: Proxy, library: str, workplace: Path, tmp_path: Path
) -> None:
    """Truncated, damaged and missing answers are asked for again."""
    line.reset(twice)
    for name, store in (("near", str(workplace / "store")), ("far", library)):
        prune(pruning(workplace, tmp_path / name, store=store, sparsities=(0.5,)))
    assert files_of(tmp_path / "near") == files_of(tmp_path / "far")
    assert line.faults["truncated"]


@pytest.mark.usefixtures("impatient")
def test_a_server_that_stays_broken_ends_the_run(
    line: Proxy,
    near: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Tries are bounded, the line names the object, and nothing looks complete."""
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
    line.reset(lambda verb, path, _: "500" if verb == "PUT" and "/layers/" in path else None)
    assert run_pipe(monkeypatch, "store", "copy", str(near), url()) == 1
    assert "layers/" in complaint(capsys)
    with pytest.raises(StoreError, match="store copy again"):
        GradientStore.open(url())
    assert run_pipe(monkeypatch, "store", "verify", url()) == 3
    complaint(capsys)
    line.reset(lambda *_: "500")
    assert run_pipe(monkeypatch, "store", "copy", str(near), url()) == 2
    assert "credentials" in complaint(capsys)


# Going on.


def test_a_copy_goes_on_object_by_object(far: Any, line: Proxy, near: Path) -> None:
    """What has arrived is read back and not sent again; what was damaged meanwhile is."""
    names = sorted(files_of(near))
    line.reset(lambda verb, path, _: "500" if verb == "PUT" and path.endswith(names[-3]) else None)
    with pytest.raises(GradpipeError):
        copied(near, url())
    arrived = objects_in(far)
    assert COMMIT_KEY not in arrived
    assert ROOT not in arrived
    damaged = bytes(len(arrived[OBJECT]))
    far.put_object(Key=f"store/{OBJECT}", Body=damaged)
    line.reset()
    copied(near, url())
    sent = {path.removeprefix(f"/{BUCKET}/store/") for path in line.asked("PUT")}
    assert sent == files_of(near).keys() - arrived.keys() | {OBJECT}
    assert objects_in(far) == files_of(near)
    line.reset()
    copied(near, url())
    assert line.asked("PUT") == []


@pytest.mark.parametrize(
    ("verb", "when"),
    [("PUT", COPY_KEY), ("PUT", "layers/zarr.json"), ("DELETE", COPY_KEY)],
)
def test_a_host_that_dies_while_it_copies_leaves_nothing_that_looks_complete(
    far: Any, line: Proxy, near: Path, verb: str, when: str
) -> None:
    """Killed as it sends an object: no store is there, until the same command has gone on."""
    process = start_copy(near, url())

    def kill(asked: str, path: str, _: int) -> None:
        if asked == verb and path == f"/{BUCKET}/store/{when}":
            process.send_signal(signal.SIGKILL)
            process.wait()

    line.reset(kill)
    assert process.wait() == -signal.SIGKILL
    line.reset()
    if verb == "PUT":
        with pytest.raises(GradpipeError, match=r"copy again|neither commit|no store"):
            GradientStore.open(url())
    copied(near, url())
    assert objects_in(far) == files_of(near)


def test_a_copy_that_is_stopped_says_so(far: Any, line: Proxy, near: Path) -> None:
    """SIGTERM ends it with 75, once what is under way has arrived."""
    process = start_copy(near, url())

    def stop(asked: str, path: str, _: int) -> None:
        if asked == "PUT" and path.endswith("layers/zarr.json"):
            process.send_signal(signal.SIGTERM)

    line.reset(stop, lag=0.05)
    assert process.wait() == 75
    assert COMMIT_KEY not in objects_in(far)
    assert "layers/zarr.json" in objects_in(far)


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("when", ["layers/zarr.json", "calibration/sources/c/0/0"])
def test_a_folder_is_not_complete_before_all_has_arrived(
    line: Proxy, near: Path, tmp_path: Path, when: str
) -> None:
    """Meanwhile another copy is refused; killed, the folder is no store, and is gone on with."""
    copied(near, url())
    process = start_copy(url(), tmp_path / "back")
    said = []

    def kill(asked: str, path: str, _: int) -> None:
        if asked == "GET" and path.endswith(when):
            try:
                copied(url(), tmp_path / "back")
            except InputError as error:
                said.append(str(error))
            process.send_signal(signal.SIGKILL)
            process.wait()

    line.reset(kill)
    assert process.wait() == -signal.SIGKILL
    line.reset(nothing)
    assert f"process {process.pid}" in said[0]
    with pytest.raises(StoreError, match="store copy again"):
        GradientStore.open(tmp_path / "back")
    copied(url(), tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(near)


def test_a_finished_copy_that_was_damaged_is_mended(near: Path, tmp_path: Path) -> None:
    """In a folder: by the same command, which otherwise leaves it alone."""
    back = tmp_path / "back"
    copied(near, back)
    times = {path: path.stat().st_mtime_ns for path in back.rglob("*")}
    copied(near, back)
    assert {path: path.stat().st_mtime_ns for path in back.rglob("*")} == times
    for key in (OBJECT, ROOT):
        (back / key).write_bytes(bytes((back / key).stat().st_size))
    (back / "layers/zarr.json").unlink()
    copied(near, back).verify()
    assert files_of(back) == files_of(near)


def start_copy(source: object, destination: object) -> subprocess.Popen[bytes]:
    """A process that copies."""
    words = [sys.executable, "-m", "gradpipe", "store", "copy", str(source), str(destination)]
    return subprocess.Popen(words)


# What may lie there.


@pytest.mark.parametrize("place", ["bucket", "folder"])
def test_nothing_else_is_overwritten(
    place: str, far: Any, near: Path, tmp_path: Path, other: Path
) -> None:
    """Another store, a part of another's copy, other files: refused, and left as they are."""
    home = url("{}") if place == "bucket" else f"{tmp_path}/{{}}"

    def put(key: str, data: bytes) -> None:
        if place == "bucket":
            far.put_object(Key=key, Body=data)
        else:
            (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / key).write_bytes(data)

    copied(other, home.format("another"))
    put("half/partial/copy.json", (other / COMMIT_KEY).read_bytes())
    put("files/thesis.txt", b"years of work")
    put("begun/zarr.json", b"{}")

    def there() -> dict[str, bytes]:
        return objects_in(far, "") if place == "bucket" else files_of(tmp_path)

    before = there()
    for name, words in (
        ("another", "another store"),
        ("half", "part of another"),
        ("files", r"thesis\.txt"),
        ("begun", r"zarr\.json"),
    ):
        with pytest.raises(InputError, match=words):
            copied(near, home.format(name))
    assert there() == before
    put("cards/README.md", b"mine")
    copied(near, home.format("cards"))
    assert there()["cards/README.md"] == b"mine"


@pytest.mark.parametrize(
    ("destination", "options", "words"),
    [
        ("{near}", {}, "in one another"),
        ("{near}/copy", {}, "in one another"),
        ("{near}/commit.json", {}, "is a file"),
        ("{near}/commit.json/x", {}, "is a file"),
        ("{tmp}/copy", {"private": True}, "not on the Hub"),
        ("hf://someone/store", {}, "hf://datasets/OWNER/NAME"),
        ("hf://datasets/someone/store@v1", {}, "hf://datasets/OWNER/NAME"),
        ("s3://no-such-bucket/store", {}, "no-such-bucket"),
        ("gopher://host/store", {}, "Protocol not known"),
    ],
)
@pytest.mark.usefixtures("far")
def test_a_copy_to_nowhere_is_the_users_mistake(
    near: Path, tmp_path: Path, destination: str, options: dict[str, Any], words: str
) -> None:
    """Found before anything is written."""
    before = files_of(near)
    with pytest.raises(InputError, match=words):
        copied(near, destination.format(near=near, tmp=tmp_path), **options)
    assert files_of(near) == before
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_source_is_not_copied(far: Any, near: Path, tmp_path: Path) -> None:
    """Nothing that is not as it was written leaves."""
    copied(near, tmp_path / "store")
    (tmp_path / "store" / OBJECT).write_bytes(b"spoilt")
    with pytest.raises(StoreError, match=OBJECT):
        copied(tmp_path / "store", url())
    assert not {COMMIT_KEY, ROOT, OBJECT} & objects_in(far).keys()
