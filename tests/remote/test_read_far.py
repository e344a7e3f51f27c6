"""Stores far away are read ahead, kept near by, and shared; credentials are not passed on."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gradpipe import GradientStore, InputError, prune
from gradpipe.errors import one_line
from gradpipe.store.objects import COMMIT_KEY
from tests.support.cases import files_of, pruning
from tests.support.far import ROOT, complaint, url
from tests.support.faulty import Proxy
from tests.support.workplace import run_pipe

READ = """
import sys
from pathlib import Path
from gradpipe.store.reader import GradientStore
store = GradientStore.open(sys.argv[1], cache=Path(sys.argv[2]))
with store.reading_ahead(store.spec.layers):
    for layer in store.spec.layers:
        store.read(layer, store.spec.statistics)
print(store.digest)
"""


@pytest.mark.usefixtures("far")
def test_eight_processes_share_a_store_and_a_cache(
    line: Proxy, library: str, workplace: Path, tmp_path: Path
) -> None:
    """All read the same at once; what one has fetched is kept once, for all."""
    near = workplace / "store"
    line.reset(lag=0.01)
    digest = GradientStore.open(near).digest
    words = [sys.executable, "-c", READ, library, str(tmp_path / "cache")]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    for process in processes:
        assert process.communicate()[0].strip() == digest
        assert process.returncode == 0
    cached = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    entries = GradientStore.open(near).objects.record.objects
    read = {k: x for k, x in entries.items() if k == ROOT or (k[:6] == "layers" and "/c/" in k)}
    assert cached == {f"{digest}-{size}" for size, digest in read.values()}


@pytest.mark.usefixtures("far")
def test_a_cache_serves_the_next_run(
    line: Proxy, library: str, workplace: Path, tmp_path: Path
) -> None:
    """Only the commit record is asked for again; what was damaged in the cache is replaced."""
    cache = tmp_path / "cache"

    def pruned(name: str) -> dict[str, bytes]:
        prune(pruning(workplace, tmp_path / name, store=library, include=("mlp",), cache=cache))
        return files_of(tmp_path / name)

    first = pruned("a")
    line.reset()
    assert pruned("b") == first
    assert {path.rpartition("/")[2] for path in line.asked("GET")} <= {"library", COMMIT_KEY}
    kept = sorted(path for path in cache.rglob("*") if path.is_file())
    for path in kept[::2]:
        path.write_bytes(b"?" * path.stat().st_size)
    kept[1].write_bytes(b"")
    assert pruned("c") == first
    line.reset()
    assert pruned("d") == first
    assert {path.rpartition("/")[2] for path in line.asked("GET")} <= {"library", COMMIT_KEY}


@pytest.mark.usefixtures("far")
def test_objects_are_fetched_ahead_several_at_once(
    line: Proxy, library: str, workplace: Path, tmp_path: Path
) -> None:
    """One request for each object, more than there are workers under way at a time."""
    line.reset(lag=0.05)
    prune(pruning(workplace, tmp_path / "out", store=library, workers=1))
    fetched = [path for path in line.asked("GET") if "/layers/" in path]
    assert len(fetched) == len(set(fetched))
    assert line.most_in_flight >= 4
    assert [path for path in fetched if path.endswith("/zarr.json")] == []


def test_a_cache_of_a_store_near_by_is_refused(workplace: Path, tmp_path: Path) -> None:
    """It would keep nothing."""
    with pytest.raises(InputError, match="--cache"):
        prune(pruning(workplace, tmp_path / "out", cache=tmp_path / "cache"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--cache"):
        prune(pruning(workplace, tmp_path / "out", store=url(), cache=tmp_path / "file"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Credentials.

SIGNED = "https://cdn.host/object?Expires=1&Signature=abcdefghijklmnop&Key-Pair-Id=K"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("https://me:pass@host/store", "https://…@host/store"),
        (f"403 for url '{SIGNED}'", "403 for url 'https://cdn.host/object?…'"),
        (f"token hf_{'a' * 34} is not valid", "token … is not valid"),
        ("header Bearer abc.def", "header Bearer …"),
        ("connect(key=1, secret=abc)", "connect(key=1, secret=…)"),
        ("hf://datasets/me/store@v1: no store?", "hf://datasets/me/store@v1: no store?"),
    ],
)
def test_credentials_are_taken_out_of_messages(said: str, shown: str) -> None:
    """Whatever a library says, a signature, a token or a password is not passed on."""
    assert one_line(ValueError(said)) == shown


def test_a_password_in_a_url_is_not_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Not even where the URL is at fault."""
    assert run_pipe(monkeypatch, "store", "info", "gopher://me:secret-of-no-one@host/store") == 2
    assert "gopher://…@host/store" in complaint(capsys)
