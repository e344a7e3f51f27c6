"""Pruned checkpoints: the oracle's masks, nothing else changed, in however many passes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from gradpipe import EvalConfig, Shard, evaluate, prune
from tests.support.cases import (
    CASES,
    GPT2,
    LLAMA,
    MECHANISMS,
    MIXTRAL,
    NUM_SAMPLES,
    SEQ_LEN,
    TOKENS,
    VIT,
    Case,
    Shelf,
    files_of,
    pruning,
    tensors_of,
)
from tests.support.reference import (
    reference_mask,
    reference_nm_mask,
    reference_perplexity,
    reference_score,
)

METHODS: list[dict[str, Any]] = [
    *({"method": method} for method in ("magnitude", "wanda", "ria", "fisher")),
    *(
        {"method": method, "grad_norm": norm}
        for method in ("gradient", "gblm", "gradient-ria")
        for norm in ("l1", "l2", "sum")
    ),
]
OTHERS = tuple(case for case in CASES if case not in MECHANISMS)


@pytest.mark.parametrize(
    ("case", "options"),
    [(case, options) for case in MECHANISMS for options in METHODS]
    + [(case, {"method": "gblm", "grad_norm": "l2"}) for case in OTHERS],
    ids=str,
)
def test_masks_equal_the_reference(
    case: Case, options: dict[str, Any], shelf: Shelf, tmp_path: Path
) -> None:
    """Those of float64 scores on plain autograd's statistics, for a sparsity and two patterns."""
    root, oracle = shelf.root(case), shelf.oracle(case)
    prune(pruning(root, tmp_path / "out", sparsities=(0.5,), patterns=("2:4", "4:8"), **options))
    dense = tensors_of(root / "model")
    pruned = {name: tensors_of(tmp_path / "out" / name) for name in ("s0.50", "2-4", "4-8")}
    for layer in shelf.store(case).spec.layers:

        def oriented(tensors: dict[str, Tensor], layer: Any = layer) -> Tensor:
            tensor = tensors[layer.weight_key]
            return tensor.T if layer.transposed else tensor

        weight = oriented(dense)
        score = reference_score(
            weight=weight, stats=oracle[layer.name], num_samples=NUM_SAMPLES, **options
        )
        masks = {
            "s0.50": reference_mask(score, 0.5, "output"),
            "2-4": reference_nm_mask(score, 2, 4),
            "4-8": reference_nm_mask(score, 4, 8),
        }
        for target, mask in masks.items():
            assert torch.equal(oriented(pruned[target]), weight * mask), (layer.name, target)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_pruned_weights_change(case: Case, shelf: Shelf, tmp_path: Path) -> None:
    """Every other tensor and file, and every kept weight, keeps its bytes; pruned ones are +0.0."""
    model, out = shelf.root(case) / "model", tmp_path / "out"
    (result,) = prune(pruning(shelf.root(case), out))
    layers = {layer.name: layer for layer in result.layers}
    assert set(layers) == {layer.name for layer in shelf.store(case).spec.layers}
    for file in sorted(model.glob("*.safetensors")):
        before, after = (tensors_of_file(folder / file.name) for folder in (model, out))
        assert before.keys() == after.keys()
        for key, dense in before.items():
            if (layer := layers.get(key.removesuffix(".weight"))) is None:
                assert after[key].tobytes() == dense.tobytes(), key
                continue
            zero = after[key] == 0
            assert after[key][~zero].tobytes() == dense[~zero].tobytes()
            assert not np.signbit(after[key][zero]).any()
            assert int(zero.sum()) == layer.zeros == dense.size // 2
    source, written = files_of(model), files_of(out)
    assert written.keys() - source.keys() == {"pruning.json", "README.md"}
    for name, data in source.items():
        assert name.endswith(".safetensors") or written[name] == data


def tensors_of_file(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """As numpy sees them."""
    return {key: x.numpy() for key, x in tensors_of(path.parent, path.name).items()}


@pytest.mark.parametrize("case", MECHANISMS, ids=str)
def test_a_pruned_model_opens_in_transformers(case: Case, shelf: Shelf, tmp_path: Path) -> None:
    """With the zeros of the report and no others; ours of its perplexity is a plain loop's."""
    out, root = tmp_path / "out", shelf.root(case)
    prune(pruning(root, out))
    layers = json.loads((out / "pruning.json").read_text())["layers"]
    opens = AutoModelForImageClassification if case.is_images else AutoModelForCausalLM
    model = opens.from_pretrained(out)
    zeros = sum(int((x == 0).sum()) for x in model.parameters())
    assert zeros == sum(layer["zeros"] for layer in layers.values())
    if not case.is_images:
        data = case.collecting(root).data
        run = EvalConfig(model=str(out), data=data, seq_len=SEQ_LEN, batch_size=3)
        expected = reference_perplexity(model, TOKENS, SEQ_LEN)
        assert evaluate(run).perplexity == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        *((case, {"method": "gblm"}) for case in MECHANISMS),
        (LLAMA, {"method": "sparsegpt"}),
        (LLAMA, {"method": "alps"}),
        (LLAMA, {"method": "alps", "curvature": "kfac", "allocation": "sensitivity"}),
        (GPT2, {"method": "wanda", "update": "obs"}),
        (MIXTRAL, {"method": "gblm", "grad_norm": "l2", "update": "lsq"}),
        (VIT, {"method": "fisher", "update": "lsq", "curvature": "kfac", "group": "global"}),
    ],
    ids=str,
)
def test_targets_together_and_shards_write_the_bytes_of_one_target_alone(
    case: Case, options: dict[str, Any], shelf: Shelf, tmp_path: Path
) -> None:
    """Several targets in one pass give each one's files, and so do several jobs."""
    root = shelf.root(case)
    patterns = () if {"group", "allocation"} & {*options} else ("2:4",)  # which are alike in all
    every = {"sparsities": (0.5, 0.7), "patterns": patterns, **options}
    together = prune(pruning(root, tmp_path / "all", **every))
    targets: dict[str, dict[str, Any]] = {
        "s0.50": {"sparsities": (0.5,)},
        "s0.70": {"sparsities": (0.7,)},
        **({"2-4": {"patterns": patterns}} if patterns else {}),
    }
    assert [result.label for result in together] == [*targets]
    for result, target in zip(together, targets.values(), strict=True):
        assert result.achieved == pytest.approx(result.requested, abs=0.02)
        prune(pruning(root, tmp_path / result.label, **target, **options))
        assert files_of(tmp_path / result.label) == files_of(result.folder)
    for index in (2, 0, 1):
        assert not (tmp_path / "shards").exists()
        results = prune(pruning(root, tmp_path / "shards", shard=Shard(index, 3), **every))
    assert [result.label for result in results] == [*targets]
    assert files_of(tmp_path / "shards") == files_of(tmp_path / "all")
    assert {path.name for path in tmp_path.iterdir()} == {"all", "shards", *targets}
