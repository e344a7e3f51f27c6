"""The page on extending: its code runs from top to bottom and prints what the page shows."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from gradpipe import PruneConfig, open_store, prune, verify
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.prune.allocation import ALLOCATIONS
from gradpipe.stages.prune.methods import CURVATURES, METHODS, UPDATES
from gradpipe.store.statistics import STATISTICS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"
TABLES: tuple[dict[str, Any], ...] = (STATISTICS, METHODS, UPDATES, CURVATURES, ALLOCATIONS)

_EXAMPLE = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HOMES = re.compile(r"`((?:[a-z]+/)+(?:[a-z_]+\.py)?|[a-z_]+\.pyi?)`")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's programs have run; its entries are known until the tests are done."""
    return tmp_path_factory.mktemp("extending")


@pytest.fixture(scope="module")
def printed(folder: Path) -> Any:
    """What each block of code printed, beside what the page shows."""
    before = [dict(table) for table in TABLES]
    names: dict[str, Any] = {}
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for source, shown in _EXAMPLE.findall(PAGE.read_text(encoding="utf-8")):
            lines: list[str] = []
            names["print"] = lambda *values, lines=lines: lines.append(" ".join(map(str, values)))
            exec(compile(source, str(PAGE), "exec"), names)  # noqa: S102 (the page is ours)
            found.append(("\n".join(lines) + "\n", shown))
    yield found
    for table, entries in zip(TABLES, before, strict=True):
        table.clear()
        table.update(entries)


def test_each_example_prints_what_is_shown(printed: list[tuple[str, str]]) -> None:
    """A statistic, a formula and a solver, added from outside in this order."""
    assert [got for got, _ in printed] == [shown for _, shown in printed]
    assert len(printed) == 3
    assert PAGE.read_text(encoding="utf-8").count("```python") == 3


@pytest.mark.usefixtures("printed")
def test_the_formula_is_what_its_text_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights as when the formula is given by hand."""
    monkeypatch.chdir(folder)
    config = PruneConfig(
        model="embedded",
        store="store",
        out=folder / "by-hand",
        score="abs(W)*X*Y",
        group="layer",
        sparsities=(0.5,),
    )
    [by_hand] = prune(config)
    files = [x / "model.safetensors" for x in (by_hand.folder, folder / "loud")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.usefixtures("printed")
def test_the_solver_lowers_the_error_of_the_output(folder: Path) -> None:
    """Of every layer, beside the same mask with the weights left as they were."""
    store = open_store(folder / "store")
    before, after = Checkpoint.open("embedded"), Checkpoint.open(str(folder / "rescaled"))
    layers = {layer.name: layer for layer in store.spec.layers}
    for layer in layers.values():
        packed = store.read_norms(layers[layer.input_of or layer.name], "hessian")
        upper_II = torch.zeros(layer.shape[1], layer.shape[1])
        upper_II[*torch.triu_indices(*upper_II.shape)] = torch.from_numpy(packed)
        H = upper_II + upper_II.triu(1).T
        weight_OI, found_OI = (x.read(layer.weight_key).float() for x in (before, after))
        lost = [weight_OI - weight_OI * (found_OI != 0), weight_OI - found_OI]
        plain, rescaled = (float(((x @ H) * x).sum()) for x in lost)
        assert rescaled < plain


@pytest.mark.usefixtures("printed")
def test_an_output_is_verified_where_its_method_is_not_known(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A solver of somebody's program moves weights; `pipe verify` runs without that program."""
    for name in ("rescaled", "loud"):
        monkeypatch.delitem(METHODS, name)
        assert verify(str(folder / name), "embedded").num_layers == 28


@pytest.mark.parametrize("name", ["architecture", "extending", "glossary"])
def test_each_place_that_is_named_is_there(name: str) -> None:
    """Files and folders in the pages for those who change the package."""
    named = set(_HOMES.findall((PAGE.parent / f"{name}.md").read_text(encoding="utf-8")))
    known = {x for x in named for folder in (ROOT / "gradpipe", ROOT) if (folder / x).exists()}
    assert named == known
    assert named or name == "glossary"  # which names words, and no files
