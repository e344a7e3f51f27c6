"""A hub with the presets' datasets, somebody's own and models, and a process that talks to it."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.support import hub as hubs
from tests.support import hub_content as content
from tests.support.far import far, impatient, library, line, near, other, server
from tests.support.models import save_tiny

__all__ = ["far", "impatient", "library", "line", "near", "other", "server"]  # fixtures


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hubs.Hub]:
    """The presets' datasets at their pinned commits, each with a newer one; two of someone's."""
    root = tmp_path_factory.mktemp("hub")
    content.write_rows(root / "c4" / content.C4_TRAIN, content.TRAIN)
    content.write_rows(root / "c4" / content.C4_VALIDATION, content.VALIDATION)
    for split, rows in (
        ("train", content.WIKI_TRAIN),
        ("validation", []),
        ("test", content.WIKI_TEST),
    ):
        name = f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet"
        content.write_rows(root / "wikitext" / name, rows)
    content.write_rows(root / "texts" / "data" / "train-00000-of-00001.parquet", content.OWN_TRAIN)
    content.write_rows(root / "texts" / "data" / "test-00000-of-00001.parquet", content.OWN_TEST)
    content.write_rows(root / "tables" / "prose" / "train-0.jsonl", content.OWN_TEST, column="body")
    content.write_rows(root / "tables" / "prose" / "test-0.jsonl", content.OWN_TRAIN, column="body")
    content.write_rows(
        root / "tables" / "verse" / "train-0.jsonl", content.OWN_TRAIN, column="body"
    )
    (root / "tables" / "README.md").write_text(content.TABLES_CARD)
    (root / "empty").mkdir()
    (root / "empty" / ".gitattributes").write_text("*.bin filter=lfs\n")
    save_tiny("llama", root / "tiny", max_shard_size="20KB")
    (root / "tiny" / "LICENSE").write_text("all rights to all\n")
    (root / "tiny" / "pytorch_model.bin").write_bytes(b"a pickle that must not travel")
    (root / "pickled").mkdir()
    (root / "pickled" / "config.json").write_bytes((root / "tiny" / "config.json").read_bytes())
    (root / "pickled" / "pytorch_model.bin").write_bytes(b"a pickle that must not travel")
    with hubs.serve() as hub:
        hub.commit("datasets/allenai/c4", root / "c4", content.C4_COMMIT)
        hub.commit("datasets/Salesforce/wikitext", root / "wikitext", content.WIKITEXT_COMMIT)
        hub.commit("datasets/allenai/c4", root / "empty")
        hub.commit("datasets/Salesforce/wikitext", root / "empty")
        hub.commit("datasets/someone/texts", root / "texts")
        hub.commit("datasets/someone/tables", root / "tables")
        hub.commit("datasets/someone/nothing", root / "empty")
        hub.commit("models/someone/tiny", root / "tiny")
        hub.commit("models/someone/pickled", root / "pickled")
        hub.commit("models/someone/nothing", root / "empty")
        for kind in hubs.KINDS:
            hub.commit(f"{kind}/someone/gated", root / "empty")
            hub.gated.add(f"{kind}/someone/gated")
        yield hub


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clients' folder, empty at first."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def client(hub: hubs.Hub, cache: Path) -> Iterator[ProcessPoolExecutor]:
    """The process that the library runs in."""
    with hubs.client(hub.endpoint, cache) as pool:
        yield pool
