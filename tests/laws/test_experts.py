"""Mixtures of experts: one layer for each matrix, routed tokens only, experts never chosen."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from gradpipe import collect, open_store, prune
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.model.conversion import find_sources
from gradpipe.stages.model.experts import RoutedLinear, split_experts
from gradpipe.stages.model.load import load_model
from tests.support.cases import MIXTRAL, collecting, pruning, tensors_of, written
from tests.support.models import VOCAB_SIZE, random_ids, save_tiny, tiny_model
from tests.support.reference import reference_mask, reference_nm_mask, with_plain_experts

FAMILIES = ("mixtral", "qwen3_moe")
NUM_EXPERTS = 4
ALL = ("grad_l1", "grad_l2", "act_l2", "hessian", "grad_cov")


@pytest.fixture(scope="module", params=FAMILIES)
def scarce(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a store of one sample of two tokens, which reach only some experts."""
    root = written(tmp_path_factory.mktemp(request.param), request.param, max_shard_size="40KB")
    collect(collecting(root, num_samples=1, seq_len=2, statistics=ALL))
    return root


def unseen(root: Path) -> set[str]:
    """Names of the store's layers that saw no token."""
    store = open_store(root / "store")
    return {x.name for x in store.spec.layers if store.is_unseen(x)}


def pruned(root: Path, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any], str]:
    """Weights and report of one pruned checkpoint, and what was said."""
    said = io.StringIO()
    out = root / "out"
    prune(pruning(root, out, overwrite=True, **options), Console(file=said, width=200))
    return tensors_of(out), json.loads((out / "pruning.json").read_text()), said.getvalue()


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_taken_apart_are_the_same_model(family: str, tmp_path: Path) -> None:
    """Logits of the fused model, of ours and of the reference's agree; no weight is copied."""
    checkpoint = Checkpoint.open(str(save_tiny(family, tmp_path / "model")))
    model = load_model(checkpoint, torch.float32, torch.device("cpu"))
    ids = random_ids(VOCAB_SIZE, 2, 12, seed=3)
    fused = model(ids).logits
    storage = model.model.layers[1].mlp.experts.down_proj.untyped_storage().data_ptr()
    split_experts(model, find_sources(model, checkpoint))
    torch.testing.assert_close(model(ids).logits, fused, rtol=1e-5, atol=1e-5)
    plain = with_plain_experts(tiny_model(family))
    torch.testing.assert_close(plain(ids).logits, fused, rtol=1e-5, atol=1e-5)
    routed = [m for m in model.modules() if isinstance(m, RoutedLinear)]
    assert len(routed) == 2 * NUM_EXPERTS * 3
    assert storage in {m.weight.untyped_storage().data_ptr() for m in routed}


@pytest.mark.parametrize(
    "options",
    [
        {"method": "wanda"},
        {"method": "gblm"},
        {"method": "fisher", "group": "output"},
        {"method": "wanda", "update": "obs", "group": "output"},
        {"method": "gblm", "update": "lsq", "curvature": "kfac"},
    ],
    ids=str,
)
def test_an_expert_that_saw_no_token_is_pruned_by_magnitude(
    scarce: Path, options: dict[str, Any]
) -> None:
    """It is listed in the report and said aloud; the others are not."""
    missing = unseen(scarce)
    assert missing
    assert len(missing) < 2 * NUM_EXPERTS * 3
    tensors, report, said = pruned(scarce, sparsities=(0.5,), **options)
    assert set(report["unseen_layers"]) == missing
    assert f"{len(missing)} layers that no calibration token reached" in said
    dense = Checkpoint.open(str(scarce / "model"))
    for name in missing:
        weight = dense.read(f"{name}.weight")
        mask = reference_mask(weight.double().abs(), 0.5, "output")
        assert torch.equal(tensors[f"{name}.weight"], weight * mask)


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_solvers_leave_unseen_experts_to_magnitude(scarce: Path, method: str) -> None:
    """There is no curvature to solve with: 2:4 by magnitude."""
    tensors, report, _ = pruned(scarce, patterns=("2:4",), method=method)
    dense = Checkpoint.open(str(scarce / "model"))
    assert set(report["unseen_layers"]) == unseen(scarce)
    for name in unseen(scarce):
        weight = dense.read(f"{name}.weight")
        mask = reference_nm_mask(weight.double().abs(), 2, 4)
        assert torch.equal(tensors[f"{name}.weight"], weight * mask)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "wanda", "allocation": "owl"},
        {"method": "wanda", "allocation": "dlp"},
        {"method": "alps", "allocation": "sensitivity"},
        {"method": "fisher", "group": "global"},
        {"method": "wanda", "allocation": "a file"},
    ],
    ids=str,
)
def test_allocations_do_not_empty_unseen_experts(scarce: Path, options: dict[str, Any]) -> None:
    """Their scores say nothing: they get the target, and the rest meets it without them."""
    layers = open_store(scarce / "store").spec.layers
    if options.get("allocation") == "a file":
        seen = {x.name: 0.3 if x.block else 0.6 for x in layers if x.name not in unseen(scarce)}
        wish = seen | dict.fromkeys(unseen(scarce), 0.1)
        (scarce / "wish.json").write_text(json.dumps(wish))
        options = options | {"allocation": str(scarce / "wish.json")}
    tensors, _, _ = pruned(scarce, sparsities=(0.5,), **options)
    zeros = {x.name: int((tensors[x.weight_key] == 0).sum()) for x in layers}
    sizes = {x.name: x.shape[0] * x.shape[1] for x in layers}
    for name in unseen(scarce):
        assert zeros[name] == sizes[name] // 2
    assert sum(zeros.values()) == pytest.approx(sum(sizes.values()) / 2, abs=len(layers))


def test_a_router_is_never_meant(scarce: Path) -> None:
    """A pattern that its name happens to match leaves it dense, with or without statistics."""
    dense = Checkpoint.open(str(scarce / "model"))
    for method in ("wanda", "magnitude"):
        tensors, report, _ = pruned(scarce, method=method, include=("layers.0",))
        assert not any(name.endswith("gate") for name in report["layers"])
        for key in dense.tensors:
            if key.endswith("gate.weight"):
                assert torch.equal(tensors[key], dense.read(key))


def test_layers_that_need_no_statistics_are_never_unseen(scarce: Path) -> None:
    """Magnitude itself falls back on nothing."""
    _, report, said = pruned(scarce, method="magnitude")
    assert report["unseen_layers"] == []
    assert "no calibration token" not in said


@pytest.mark.parametrize("schedule", ["resident", "streamed"])
def test_a_router_s_balancing_loss_is_left_out(schedule: str, tmp_path: Path) -> None:
    """Where config.json asks for it, the gradients are still those of the tokens' loss."""
    MIXTRAL.make(tmp_path)
    settings = MIXTRAL.collecting(tmp_path, schedule=schedule, statistics=("grad_sum",))
    plain = collect(settings)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"output_router_logits": True}))
    balanced = collect(replace(settings, store=tmp_path / "balanced"))
    for layer in plain.spec.layers:
        first, second = (x.read_norms(layer, "grad_sum") for x in (plain, balanced))
        assert (first == second).all(), layer.name


@pytest.mark.parametrize("schedule", ["resident", "streamed"])
def test_experts_fused_in_the_checkpoint_have_the_same_sums(schedule: str, tmp_path: Path) -> None:
    """In one tensor as one by one; only the rows of gate and up then are one layer's."""
    MIXTRAL.make(tmp_path)
    settings = MIXTRAL.collecting(tmp_path, schedule=schedule, statistics=("grad_l1",))
    plain, folder = collect(settings), Path(settings.model)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tiny_model("mixtral").state_dict(), folder / "model.safetensors")
    fused = collect(replace(settings, store=tmp_path / "fused"))
    for layer in plain.spec.layers:
        rows, name = slice(None), layer.name
        if found := re.fullmatch(r"(.*)block_sparse_moe\.experts\.(\d)\.(w[123])", name):
            owner, number, matrix = found.groups()
            height = layer.shape[0]
            rows = {"w1": slice(height), "w2": slice(None), "w3": slice(height, None)}[matrix]
            stack = "down_proj" if matrix == "w2" else "gate_up_proj"
            name = f"{owner}mlp.experts.{stack}.{number}"
        own = fused.spec.layer(name)
        assert own is not None, name
        got, expected = fused.read_norms(own, "grad_l1")[rows], plain.read_norms(layer, "grad_l1")
        torch.testing.assert_close(torch.from_numpy(got), torch.from_numpy(expected))
