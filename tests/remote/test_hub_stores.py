"""Stores copied to the Hub and back: the real client against a hub on this machine."""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from gradpipe import GradientStore, StoreError
from gradpipe.store.objects import COMMIT_KEY, COPY_KEY
from tests.support import hub as hubs
from tests.support.cases import files_of
from tests.support.hub_content import pipe

STORE = Path(__file__).parents[1] / "data" / "store-v2"
OTHER = Path(__file__).parents[1] / "data" / "store-v1"
TOKEN = "hf_a_token_of_no_one"


def copy(client: ProcessPoolExecutor, source: object, *words: str) -> tuple[int, str]:
    """Exit code and what was said of `pipe store copy`."""
    code, said = client.submit(pipe, "store", "copy", str(source), *words).result()
    assert TOKEN not in said
    assert len(said.splitlines()) == (code != 0)
    return code, said


def files(hub: hubs.Hub, repo: str) -> dict[str, bytes]:
    """The newest commit."""
    return files_of(hub.resolve(repo, "main")[1])


@pytest.fixture(autouse=True)
def _token(client: ProcessPoolExecutor) -> None:
    client.submit(_sign_in).result()


def _sign_in() -> None:
    import os  # noqa: PLC0415 (in the other process)

    os.environ["HF_TOKEN"] = TOKEN


def test_a_store_goes_to_the_hub_and_back(
    hub: hubs.Hub, client: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """A repository is made, with every object and a card that names what was measured on what."""
    repo, url = "datasets/someone/gradients", "hf://datasets/someone/gradients"
    assert copy(client, STORE, url, "--private") == (0, "")
    published = files(hub, repo)
    card = published.pop("README.md").decode()
    assert published == files_of(STORE)
    assert repo in hub.private
    store = GradientStore.open(STORE)
    spec = store.spec
    for words in (spec.model.name, spec.samples.dataset, *spec.statistics, spec.command):
        assert words in card
    assert store.digest in card
    assert len(hub.repos[repo]) <= 5  # commits: of batches, not of objects
    assert copy(client, url, str(tmp_path / "back")) == (0, "")
    assert files_of(tmp_path / "back") == published


def test_a_copy_to_the_hub_goes_on(hub: hubs.Hub, client: ProcessPoolExecutor) -> None:
    """Broken off, nothing there is a store; then only what is not there is sent."""
    repo, url = "datasets/someone/broken", "hf://datasets/someone/broken"
    hub.refuses = f"{repo}/commit/main"
    hub.commit(repo, hub.uploads / "nothing")
    (hub.uploads / "nothing").mkdir()
    code, said = copy(client, STORE, url)
    assert (code, url in said) == (2, True)
    hub.refuses = ""
    (hub.uploads / "half").mkdir()
    for key in (COPY_KEY, "layers/zarr.json"):
        path = hub.uploads / "half" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((STORE / (COMMIT_KEY if key == COPY_KEY else key)).read_bytes())
    hub.commit(repo, hub.uploads / "half")
    code, said = client.submit(pipe, "store", "verify", url).result()
    assert (code, "store copy again" in said) == (3, True)
    assert copy(client, STORE, url) == (0, "")
    assert files(hub, repo).keys() - {"README.md"} == files_of(STORE).keys()
    commits = len(hub.repos[repo])
    assert copy(client, STORE, url) == (0, "")
    assert len(hub.repos[repo]) == commits


def test_on_the_hub_nothing_is_overwritten_or_shown(
    hub: hubs.Hub, client: ProcessPoolExecutor
) -> None:
    """Another store, somebody's data, a public repository for what is to be private."""
    assert copy(client, OTHER, "hf://datasets/someone/another") == (0, "")
    before = files(hub, "datasets/someone/another")
    code, said = copy(client, STORE, "hf://datasets/someone/another")
    assert (code, "another store" in said) == (2, True)
    code, said = copy(client, STORE, "hf://datasets/someone/texts")
    assert (code, "other files" in said) == (2, True)
    assert files(hub, "datasets/someone/another") == before
    (hub.uploads / "public").mkdir()
    hub.commit("datasets/someone/public", hub.uploads / "public")
    code, said = copy(client, STORE, "hf://datasets/someone/public", "--private")
    assert (code, "--private" in said) == (2, True)
    assert files(hub, "datasets/someone/public") == {}
    assert copy(client, STORE, "hf://datasets/someone/public/a/folder") == (0, "")
    assert {x[:9] for x in files(hub, "datasets/someone/public")} == {"a/folder/"}


def test_half_a_copy_is_incomplete(tmp_path: Path) -> None:
    """The line says what to do."""
    (tmp_path / COPY_KEY).parent.mkdir()
    (tmp_path / COPY_KEY).write_bytes((STORE / COMMIT_KEY).read_bytes())
    with pytest.raises(StoreError, match="store copy again"):
        GradientStore.open(tmp_path)
