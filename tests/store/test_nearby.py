"""Objects fetched ahead: what a thread is about to read is kept, the rest while there is room."""

import threading
from pathlib import Path

import pytest

from gradpipe.errors import GradpipeError
from gradpipe.store import nearby
from gradpipe.store.nearby import ObjectCache, ReadAhead
from gradpipe.store.objects import digest


@pytest.fixture
def fetched() -> list[str]:
    """Keys, as often as they are fetched."""
    return []


@pytest.fixture
def ahead(fetched: list[str], monkeypatch: pytest.MonkeyPatch) -> ReadAhead:
    """Room for four objects; one called `odd` cannot be had."""
    monkeypatch.setattr(nearby, "_HELD_BYTES", 4)
    lock = threading.Lock()

    def fetch(key: str) -> bytes:
        with lock:
            fetched.append(key)
        if key == "odd":
            raise GradpipeError("no odd")
        return key.encode()

    return ReadAhead(fetch, lambda _: 1)


def test_what_is_read_now_is_fetched_once(ahead: ReadAhead, fetched: list[str]) -> None:
    """However little room there is; of what comes later, as much as half of it takes."""
    keys = [f"{i}" for i in range(10)]
    ahead.begin(keys, ["a", "b", "c"])
    assert [ahead.read(key) for key in keys] == [key.encode() for key in keys]
    ahead.close()
    assert sorted(set(fetched)) == sorted(fetched)
    assert {*keys} <= {*fetched} <= {*keys, "a", "b"}


def test_what_was_not_said_before_is_fetched(ahead: ReadAhead, fetched: list[str]) -> None:
    """And what was read a short while ago is not fetched again."""
    assert [ahead.read(key) for key in "xyx"] == [b"x", b"y", b"x"]
    assert fetched == ["x", "y"]
    for key in "abcd":
        ahead.read(key)
    ahead.read("x")
    assert fetched.count("x") == 2
    ahead.close()


def test_an_error_is_for_whoever_reads(ahead: ReadAhead, fetched: list[str]) -> None:
    """What is only fetched ahead fails nobody, and is tried again when it is asked for."""
    ahead.begin(["a"], ["odd"])
    assert ahead.read("a") == b"a"
    with pytest.raises(GradpipeError, match="no odd"):
        ahead.read("odd")
    with pytest.raises(GradpipeError, match="no odd"):
        ahead.read("odd")
    ahead.close()
    assert fetched.count("odd") >= 2


def test_a_cache_gives_what_it_was_given_or_nothing(tmp_path: Path) -> None:
    """By digest and size; damaged, cut or missing is the same as never kept."""
    cache, data = ObjectCache(tmp_path / "cache"), b"some bytes"
    assert cache.read(len(data), digest(data)) is None
    cache.write(digest(data), data)
    assert cache.read(len(data), digest(data)) == data
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    for spoilt in (b"", data[:-1], data[:-1] + b"?", data + b"."):
        kept.write_bytes(spoilt)
        assert cache.read(len(data), digest(data)) is None
    cache.write(digest(data), data)
    assert cache.read(len(data), digest(data)) == data


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """In one line, with what to do."""
    (tmp_path / "file").write_text("")
    with pytest.raises(GradpipeError, match="--cache"):
        ObjectCache(tmp_path / "file").write("0" * 32, b"data")
