"""A run is resolved once, and what it records says what shaped it and not where that lay."""

import json
import shutil
from pathlib import Path

import pytest

from gradpipe import (
    InputError,
    PruneConfig,
    Shard,
    collect,
    open_store,
    prune,
)
from gradpipe.stages.prune.formula import Expression
from tests.support.cases import collecting, files_of, pruning, written


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded tiny model and its store."""
    root = written(tmp_path_factory.mktemp("plan"), max_shard_size="20KB")
    collect(collecting(root, num_samples=2))
    return root


def write_wish(path: Path, root: Path, sparsity: float) -> Path:
    """A file that gives one layer this sparsity, and the others 0.4."""
    names = [layer.name for layer in open_store(root / "store").spec.layers]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**dict.fromkeys(names, 0.4), names[0]: sparsity}))
    return path


def test_formulas_are_parsed_once_whatever_the_number_of_layers(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixture of experts has tens of thousands of layers."""
    parsed: list[str] = []
    parse = Expression.parse

    def counted(text: str) -> Expression:
        parsed.append(text)
        return parse(text)

    monkeypatch.setattr(Expression, "parse", counted)
    counts = []
    for include in (("layers.0.mlp.down",), ()):
        parsed.clear()
        prune(pruning(root, tmp_path / str(include), include=include, allocation="owl"))
        counts.append(len(parsed))
    assert counts[0] == counts[1] > 0


def test_no_output_says_where_inputs_lay(root: Path, tmp_path: Path) -> None:
    """Model, store and allocation file elsewhere: the same bytes, and no path in any of them."""
    outputs = []
    for place in ("one", "two"):
        here = tmp_path / place
        for name in ("model", "store"):
            shutil.copytree(root / name, here / name)
        wish = write_wish(here / "wish.json", root, 0.7)
        prune(pruning(here, here / "out", sparsities=(0.5,), allocation=str(wish)))
        outputs.append(files_of(here / "out"))
    assert outputs[0] == outputs[1]
    assert not [name for name, data in outputs[0].items() if str(tmp_path).encode() in data]
    report = json.loads(outputs[0]["pruning.json"])
    assert report["allocation"].startswith("wish.json (xxh3 ")
    assert report["allocation"] in report["command"]


def test_a_file_of_other_content_is_another_allocation(root: Path, tmp_path: Path) -> None:
    """Two files of one name are told apart by what they hold."""
    found = set()
    for sparsity in (0.6, 0.7):
        wish = write_wish(tmp_path / str(sparsity) / "wish.json", root, sparsity)
        prune(pruning(root, wish.parent / "out", sparsities=(0.5,), allocation=str(wish)))
        found.add(json.loads((wish.parent / "out" / "pruning.json").read_text())["allocation"])
    assert len(found) == 2


def test_shards_by_files_of_other_content_do_not_mix(root: Path, tmp_path: Path) -> None:
    """One name, two contents: the second shard is refused, before and after OUT is there."""
    wish = write_wish(tmp_path / "wish.json", root, 0.6)

    def shard(index: int) -> PruneConfig:
        options = {"sparsities": (0.5,), "allocation": str(wish), "shard": Shard(index, 2)}
        return pruning(root, tmp_path / "out", **options)

    prune(shard(0))
    write_wish(wish, root, 0.7)
    with pytest.raises(InputError, match="another prune command"):
        prune(shard(1))
    write_wish(wish, root, 0.6)
    assert prune(shard(1))
    assert prune(shard(0)) == ()
    write_wish(wish, root, 0.7)
    with pytest.raises(InputError, match="exists"):
        prune(shard(0))
