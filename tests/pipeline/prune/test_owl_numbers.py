"""OWL with numbers of one's own: `--allocation owl:λ,M`."""

import json
from pathlib import Path

import pytest
import torch

from gradpipe import InputError, PruneConfig, open_store, prune
from tests.support.cases import LLAMA, Shelf, pruning, tensors_of
from tests.support.reference import reference_owl


@pytest.fixture
def root(shelf: Shelf) -> Path:
    """A tiny Llama and its store."""
    return shelf.root(LLAMA)


def sparsities(root: Path, out: Path, allocation: str) -> dict[str, float]:
    """What each layer was asked for."""
    options = {"method": "magnitude", "group": "layer", "sparsities": (0.6,)}  # rounds to a weight
    prune(pruning(root, out, allocation=allocation, **options))
    layers = json.loads((out / "pruning.json").read_text())["layers"]
    return {name: layer["requested"] for name, layer in layers.items()}


def test_owl_is_owl_of_the_paper_s_numbers(root: Path, tmp_path: Path) -> None:
    """λ = 0.08 and M = 5; with λ = 0 all layers get the same."""
    named, given = (sparsities(root, tmp_path / x, x) for x in ("owl", "owl:0.08,5"))
    assert named == given
    flat = sparsities(root, tmp_path / "flat", "owl:0,5")
    assert set(flat.values()) != set(named.values())
    assert list(flat.values()) == pytest.approx([0.6] * len(flat), abs=2e-3)


def test_numbers_mean_what_they_do_to_the_reference(root: Path, tmp_path: Path) -> None:
    """Blocks' sparsities are the naive ones of the same λ and M, up to whole weights."""
    store, tensors = open_store(root / "store"), tensors_of(root / "model")
    scores: dict[str, list[torch.Tensor]] = {}
    for layer in store.spec.layers:
        norms = torch.from_numpy(store.read_norms(layer, "act_l2"))
        score = tensors[layer.weight_key].abs() * norms / store.spec.samples.num_samples**0.5
        scores.setdefault(f"{layer.block}", []).append(score.flatten())
    blocks = {name: torch.cat(parts) for name, parts in scores.items()}
    wanted = reference_owl(blocks, 0.6, lam=0.03, m=2.0)
    got = sparsities(root, tmp_path / "out", "owl:0.03,2")
    assert len({round(x, 3) for x in wanted.values()}) > 1
    for layer in store.spec.layers:
        assert got[layer.name] == pytest.approx(wanted[f"{layer.block}"], abs=2e-3)


@pytest.mark.parametrize("text", ["owl:", "owl:0.1", "owl:2,5", "owl:0.1,-5", "owl:a,b", "dlp:1,2"])
def test_other_forms_are_refused(text: str) -> None:
    """In one line that shows the form."""
    with pytest.raises(InputError, match="owl:λ,M"):
        PruneConfig(model="m", store="s", out=Path("o"), allocation=text)
