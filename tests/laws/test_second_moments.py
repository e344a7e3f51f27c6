"""Hessians and gradient covariances: collected, shared, stored and used to prune."""

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gradpipe import (
    CollectConfig,
    DataConfig,
    PruneConfig,
    Shard,
    StoreError,
    collect,
    collect_shard,
    merge,
    open_store,
    prune,
)
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.model.shared_inputs import share_inputs
from gradpipe.stages.model.skeleton import take_apart
from gradpipe.stages.prune.curvature import Curvature
from gradpipe.stages.prune.decode import decode_norms
from gradpipe.stages.prune.least_squares import least_squares
from gradpipe.stages.prune.mask import unstructured_mask
from gradpipe.stages.prune.target import Group
from gradpipe.store.codec import decode_layer, encode_layer, is_sound
from gradpipe.store.schema import LayerSpec, StoreSpec
from tests.support.models import FAMILIES, save_tiny
from tests.support.reference import reference_cost
from tests.support.texts import write_text

STATISTICS = ("grad_l2", "act_l2", "hessian", "grad_cov")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a text, and its store of exact sums."""
    root = tmp_path_factory.mktemp("moments")
    save_tiny("llama", root / "model", max_shard_size="20KB")
    write_text(root / "text.txt")
    collect(config(root, root / "store"))
    return root


def config(root: Path, store: Path, **options: Any) -> CollectConfig:
    """A collection of everything that stage two can use."""
    options = {"encoding": "float32", "statistics": STATISTICS} | options
    return CollectConfig(
        model=str(root / "model"),
        store=store,
        data=DataConfig(name=str(root / "text.txt")),
        num_samples=4,
        seq_len=16,
        **options,
    )


def objects(store: Path) -> dict[str, bytes]:
    """Every object but those that name the command."""
    return {
        p.relative_to(store).as_posix(): p.read_bytes()
        for p in sorted(store.rglob("*"))
        if p.is_file() and p.name not in {"zarr.json", "commit.json", ".lock"}
    }


_SHARED = {  # the number of distinct inputs of a block's layers
    "llama": 4, "mistral": 4, "qwen2": 4, "qwen3": 4, "gemma3": 4, "phi3": 4, "opt": 4,
    "bloom": 4, "gpt2": 4, "gpt_neox": 4, "falcon": 4,
    "mixtral": 2 + 2 * 4, "qwen3_moe": 2 + 2 * 4,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_with_one_input_share_one_hessian(family: str, tmp_path: Path) -> None:
    """q, k, v and gate, up, in every block, found without values."""
    checkpoint = Checkpoint.open(str(save_tiny(family, tmp_path / "model")))
    skeleton = take_apart(checkpoint, torch.float32)
    layers = share_inputs(skeleton.model, skeleton.layers)
    for block in (0, 1):
        inside = [x.spec for x in layers if x.spec.block == block]
        assert sum(x.input_of is None for x in inside) == _SHARED[family]
        for x in inside:
            assert x.input_of is None or x.input_of in {y.name for y in inside}


def test_streamed_is_resident_and_shards_are_one_run(root: Path, tmp_path: Path) -> None:
    """Bit for bit, second moments too; merged shards to float32's rounding of one more sum."""
    collect(config(root, tmp_path / "streamed", schedule="streamed"))
    assert objects(tmp_path / "streamed") == objects(root / "store")
    for i in range(2):
        collect_shard(config(root, tmp_path / "sharded", shard=Shard(i, 2)))
    merge([tmp_path / "sharded"])
    one, merged = open_store(root / "store"), open_store(tmp_path / "sharded")
    merged.validate()
    for layer in one.spec.layers:
        for statistic in layer.own(STATISTICS):
            a, b = (s.read_norms(layer, statistic) for s in (one, merged))
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(np.abs(a).max()))


def test_a_shared_hessian_is_kept_once(root: Path) -> None:
    """Its sharers have no such group, and read the owner's."""
    store = open_store(root / "store")
    q, k = store.spec.layers[:2]
    assert k.input_of == q.name
    assert not (root / "store" / "layers" / k.name / "hessian").exists()
    assert np.array_equal(store.read_norms(q, "hessian"), store.read_norms(k, "hessian"))


def test_compact_moments_are_correlations_to_sixteen_bits(root: Path, tmp_path: Path) -> None:
    """Off by 1.6e-5 of the rows' own sizes at most; numpy and torch agree to the bit."""
    collect(config(root, tmp_path / "store", encoding="compact"))
    exact, compact = open_store(root / "store"), open_store(tmp_path / "store")
    for layer in exact.spec.layers:
        for statistic in ("hessian", "grad_cov"):
            true = decode_norms(exact.read(layer, [statistic]), statistic, torch.device("cpu"))
            encoded = compact.read(layer, [statistic])
            got = decode_norms(encoded, statistic, torch.device("cpu"))
            assert torch.equal(got, got.T)
            roots = true.diagonal().sqrt()
            assert bool(((got - true).abs() <= 1.6e-5 * roots * roots[:, None]).all())
            torch.testing.assert_close(got.diagonal(), true.diagonal(), rtol=1e-6, atol=0)
            packed = decode_layer(encoded)[statistic]
            upper = got[*torch.triu_indices(*got.shape)].numpy()
            np.testing.assert_array_equal(packed, upper)


def test_a_dead_input_has_zeros_in_its_row() -> None:
    """No division by zero in the encoding, exact zeros out of it."""
    matrix = np.array([[4.0, 0.0, 2.0], [0.0, 0.0, 0.0], [2.0, 0.0, 9.0]], dtype=np.float32)
    packed = matrix[np.triu_indices(3)]
    got = decode_layer(encode_layer("compact", {"hessian": packed}, 1, 1))["hessian"]
    np.testing.assert_allclose(got, packed, rtol=1e-4)


def test_compact_moments_of_shifted_inputs_stay_fit_to_solve_with() -> None:
    """1,024 inputs that share a mean correlate near 1: no more damping, the same least squares."""
    generator = torch.Generator().manual_seed(0)
    width = 1024
    mixing = torch.randn(width // 8, width, generator=generator) / (width // 8) ** 0.5
    x = torch.randn(2 * width, width // 8, generator=generator) @ mixing + 6
    x += 0.02 * torch.randn(2 * width, width, generator=generator)
    hessian, weight = x.T @ x, torch.randn(16, width, generator=generator) / width**0.5
    mask = unstructured_mask(weight.abs(), Fraction(1, 2), Group.parse("output"))
    packed = hessian[*torch.triu_indices(width, width)].numpy()
    errors = []
    for encoding in ("float32", "compact"):
        encoded = encode_layer(encoding, {"hessian": packed}, 1, 1)
        decoded = decode_norms(encoded, "hessian", torch.device("cpu"))
        moments = Curvature.of("layer", decoded, None)
        assert moments.notes == []
        change = (weight - least_squares(weight, mask, moments)).double()
        errors.append(reference_cost(change, hessian.double()))
    assert errors[1] == pytest.approx(errors[0], rel=0.03)


def test_a_correlation_beyond_one_decodes_alike_everywhere() -> None:
    """What no writer writes, −32768 and a negative diagonal, is a number like others."""
    encoded = encode_layer("compact", {"hessian": np.array([4, 0, 9], dtype=np.float32)}, 1, 1)
    for diagonal in ([4.0, 9.0], [-4.0, 9.0]):
        parts = encoded["hessian"].parts
        parts["values"][1] = -32768
        parts["diagonal"][:] = diagonal
        packed = decode_layer(encoded)["hessian"]
        got = decode_norms(encoded, "hessian", torch.device("cpu"))
        np.testing.assert_array_equal(packed, got[*torch.triu_indices(2, 2)].numpy())
        assert is_sound("hessian", encoded["hessian"])
        assert np.isfinite(packed).all()


@pytest.mark.parametrize("owner", ["model.layers.0.mlp.down_proj", "nobody", "self"])
def test_a_store_that_shares_with_the_wrong_layer_is_refused(root: Path, owner: str) -> None:
    """Another width, nobody, or one that shares in turn."""
    spec = open_store(root / "store").spec
    layers = list(spec.layers)
    name = layers[1].name if owner == "self" else owner
    layers[1] = replace(layers[1], input_of=name)
    with pytest.raises(StoreError, match="cannot share the"):
        replace(spec, layers=tuple(layers))
    with pytest.raises(StoreError, match="cannot share the"):
        StoreSpec.from_json(
            json.loads(json.dumps(spec.to_json() | {"layers": [x.to_json() for x in layers]}))
        )


def test_a_spec_of_before_has_no_sharing(root: Path) -> None:
    """Fields with defaults may be missing, others may not."""
    document = json.loads(json.dumps(open_store(root / "store").spec.layers[0].to_json()))
    del document["input_of"]
    assert LayerSpec.from_json(document).input_of is None
    del document["digest"]
    with pytest.raises(StoreError, match="missing or unknown fields: digest"):
        LayerSpec.from_json(document)


@pytest.mark.parametrize("schedule", ["resident", "streamed"])
def test_a_hessian_needs_no_backward_pass(root: Path, tmp_path: Path, schedule: str) -> None:
    """Collected alone, it is the same."""
    collect(config(root, tmp_path / "store", statistics=("hessian",), schedule=schedule))
    mine, theirs = objects(tmp_path / "store"), objects(root / "store")
    assert {k: v for k, v in theirs.items() if "/hessian/" in k} == {
        k: v for k, v in mine.items() if "/hessian/" in k
    }


# --- pruning from them

_RUNS: list[dict[str, Any]] = [
    {"method": "sparsegpt"},
    {"method": "alps"},
    {"method": "alps", "curvature": "kfac", "allocation": "sensitivity"},
    {"method": "wanda", "update": "obs"},
    {"method": "gblm", "grad_norm": "l2", "update": "lsq"},
    {"method": "fisher", "update": "lsq", "curvature": "kfac", "group": "global"},
]


@pytest.mark.parametrize("options", _RUNS, ids=str)
def test_every_method_and_update_reaches_its_sparsity(
    root: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Several targets in one pass write the bytes of one each, and shards those of one run."""
    base: dict[str, Any] = {"model": str(root / "model"), "store": str(root / "store"), **options}
    patterns = () if options.get("group") == "global" else ("2:4",)
    both = prune(
        PruneConfig(out=tmp_path / "both", sparsities=(0.5, 0.7), patterns=patterns, **base)
    )
    for result in both:
        assert result.achieved == pytest.approx(result.requested, abs=0.02)
    alone = prune(PruneConfig(out=tmp_path / "alone", sparsities=(0.7,), **base))[0]
    for i in range(2):
        prune(PruneConfig(out=tmp_path / "shards", sparsities=(0.7,), shard=Shard(i, 2), **base))
    for file in alone.folder.iterdir():
        assert file.read_bytes() == (both[1].folder / file.name).read_bytes(), file.name
        assert file.read_bytes() == (tmp_path / "shards" / file.name).read_bytes(), file.name


def test_a_dead_layer_is_said_and_recorded(root: Path, tmp_path: Path) -> None:
    """A Hessian of zeros is no silent identity: a note in pruning.json names the layer."""
    model = tmp_path / "model"
    shutil.copytree(root / "model", model)
    for path in model.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("layers.0.mlp.up_proj.weight"):
                tensor.zero_()  # so that down_proj's inputs are zero
        save_file(tensors, path, metadata={"format": "pt"})
    collect(replace(config(root, tmp_path / "store"), model=str(model)))
    result = prune(
        PruneConfig(
            model=str(model), store=str(tmp_path / "store"), out=tmp_path / "out", method="alps"
        )
    )[0]
    report = json.loads((result.folder / "pruning.json").read_text())
    assert report["notes"] == [
        "model.layers.0.mlp.down_proj: hessian is all zeros: every direction counts the same"
    ]
    assert report["layers"]["model.layers.0.mlp.down_proj"]["achieved"] == 0.5
