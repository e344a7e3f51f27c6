"""How many requests a reader makes: each is a round trip where the store is remote."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from gradpipe.store.reader import GradientStore
from tests.store.test_format_2 import LAYERS, write_store


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A store in a file system that is not local."""
    write_store(tmp_path / "store")
    files = fsspec.filesystem("memory")
    files.put(str(tmp_path / "store"), "/requests", recursive=True)
    yield "memory://requests"
    files.rm("/requests", recursive=True)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that are opened or fetched, in order."""
    names: list[str] = []
    real = {verb: getattr(MemoryFileSystem, verb) for verb in ("open", "cat_file")}

    def noted(verb: str) -> Any:
        def request(self: Any, path: str, *options: Any, **more: Any) -> Any:
            names.append(path.removeprefix("/requests/"))
            return real[verb](self, path, *options, **more)

        return request

    for verb in real:
        monkeypatch.setattr(MemoryFileSystem, verb, noted(verb))
    return names


def test_metadata_are_one_request(url: str, opened: list[str]) -> None:
    """Record and root, then the parts of each layer that are read, and nothing else."""
    store = GradientStore.open(url)
    assert opened == ["commit.json", "zarr.json"]
    for layer in store.spec.layers:
        store.read_norms(layer, "grad_l2")
    parts = [f"layers/{x.name}/grad_l2/{part}" for x in LAYERS for part in ("codes", "offsets")]
    assert [name.partition("/c/")[0] for name in opened[2:]] == parts


def test_whether_an_expert_was_seen_costs_no_request(url: str, opened: list[str]) -> None:
    """Counts of tokens stand in the root's copy of the metadata."""
    store = GradientStore.open(url)
    opened.clear()
    assert not any(map(store.is_unseen, store.spec.layers))
    assert not opened


def test_the_first_version_is_read_by_its_root_too(opened: list[str]) -> None:
    """A store of version 1 has the same copy."""
    golden = Path(__file__).parents[1] / "data" / "store-v1"
    fsspec.filesystem("memory").put(str(golden), "/requests", recursive=True)
    opened.clear()
    store = GradientStore.open("memory://requests")
    store.read_norms(store.spec.layers[0], "act_l2")
    assert opened[:2] == ["commit.json", "zarr.json"]
    assert [name for name in opened[2:] if name.endswith("zarr.json")] == []
    fsspec.filesystem("memory").rm("/requests", recursive=True)
