"""Heads and embeddings, tied or not: what is pruned together, and what has no statistics."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradpipe.stages.checkpoint.folder import SINGLE_NAME
from tests.support.workplace import PRUNE, Refused, edit_config, succeed


def _copy(workplace: Path, tmp_path: Path, name: str = "model") -> Path:
    return Path(shutil.copytree(workplace / name, tmp_path / "model"))


HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


def _tie(model: Path, *, with_head: bool) -> None:
    """As some models are saved: the head equals the embedding, and may stand in the file too."""
    tensors = load_file(model / SINGLE_NAME)
    tensors.pop(f"{HEAD}.weight")
    if with_head:
        tensors[f"{HEAD}.weight"] = tensors[f"{EMBEDDING}.weight"].clone()
    save_file(tensors, model / SINGLE_NAME, metadata={"format": "pt"})
    edit_config(model, tie_word_embeddings=True)


def test_tied_matrices_are_pruned_together_or_not_at_all(
    refused: Refused, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers makes one of the two: which zeros it has must not depend on its version."""
    model = _copy(workplace, tmp_path)
    _tie(model, with_head=True)
    command = PRUNE.replace("model", str(model), 1) + " --method magnitude"
    for one, other in ((HEAD, EMBEDDING), (EMBEDDING, HEAD)):
        says = (f"layers {one} and {other}", "are tied", f"--include {other} as well")
        refused(f"{command} --include {one}", says=says)
        refused(f"{command} --include {HEAD} --include embed --exclude {other}", says=says)
    out = tmp_path / "out"
    monkeypatch.chdir(workplace)
    succeed(f"{command.replace('new', str(out))} --include {HEAD} --include embed", monkeypatch)
    tensors = load_file(out / SINGLE_NAME)
    assert torch.equal(tensors[f"{HEAD}.weight"], tensors[f"{EMBEDDING}.weight"])
    assert int((tensors[f"{HEAD}.weight"] == 0).sum()) == tensors[f"{HEAD}.weight"].numel() // 2


def test_an_equal_head_that_is_not_tied_goes_its_own_way(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where config.json says so; and where the two differ."""
    model = _copy(workplace, tmp_path)
    _tie(model, with_head=True)
    edit_config(model, tie_word_embeddings=False)
    monkeypatch.chdir(workplace)
    command = f"prune {{}} store {{}} --method magnitude --include {HEAD}"
    succeed(command.format(model, tmp_path / "untied"), monkeypatch)
    succeed(command.format("model", tmp_path / "different"), monkeypatch)


def test_a_head_that_is_tied_is_found_under_its_embedding(
    refused: Refused, workplace: Path, tmp_path: Path
) -> None:
    """The checkpoint has one tensor for both, by the embedding's name."""
    model = _copy(workplace, tmp_path)
    _tie(model, with_head=False)
    says = (f"--include {HEAD}: the head of", f"is tied to {EMBEDDING}: give --include {EMBEDDING}")
    refused(f"{PRUNE.replace('model', str(model), 1)} --include {HEAD}", says=says)


def test_an_embedding_is_not_said_to_have_statistics(refused: Refused) -> None:
    """No collection measures one: only its size can be looked at."""
    says = ("lacks grad_l1", "an embedding has no statistics", "--method magnitude alone")
    refused(f"{PRUNE} --include {EMBEDDING}", says=says)


def test_an_imported_store_gets_what_it_lacks_by_import(
    refused: Refused, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradients came from files, and no collection would add to them."""
    store = tmp_path / "imported"
    monkeypatch.chdir(workplace)
    succeed(f"store import-gblm model {store} --l1 l1.pth", monkeypatch)
    command = PRUNE.replace("store", str(store))
    refused(command, says=("lacks act_l2", "import again with import-gblm --activations STORE"))
    says = ("lacks grad_l2", "import again with import-gblm --l2 FILE")
    refused(f"{command} --method gradient --grad-norm l2", says=says)
