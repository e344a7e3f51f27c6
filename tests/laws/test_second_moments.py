"""Hessians and gradient covariances: what is odd about storing, sharing and solving with them."""

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gradpipe import StoreError, collect, prune
from gradpipe.stages.prune.curvature import Curvature
from gradpipe.stages.prune.decode import decode_norms
from gradpipe.stages.prune.least_squares import least_squares
from gradpipe.stages.prune.mask import unstructured_mask
from gradpipe.stages.prune.target import Group
from gradpipe.store.codec import decode_layer, encode_layer, is_sound
from gradpipe.store.schema import LayerSpec, StoreSpec
from gradpipe.store.statistics import STATISTICS
from tests.support.cases import LLAMA, Shelf, pruning
from tests.support.reference_solvers import reference_cost


@pytest.fixture(scope="module")
def spec(shelf: Shelf) -> StoreSpec:
    """Of a store with shared Hessians."""
    return shelf.store(LLAMA).spec


def test_a_dead_input_has_zeros_in_its_row() -> None:
    """No division by zero in the encoding, exact zeros out of it."""
    matrix = np.array([[4.0, 0.0, 2.0], [0.0, 0.0, 0.0], [2.0, 0.0, 9.0]], dtype=np.float32)
    packed = matrix[np.triu_indices(3)]
    got = decode_layer(encode_layer("compact", {"hessian": packed}, 1, 1))["hessian"]
    np.testing.assert_allclose(got, packed, rtol=1e-4)


@pytest.mark.parametrize("width", [1, 127, 256, 300, 2100])
def test_a_second_moment_is_the_naive_one_above_its_diagonal(width: int) -> None:
    """Summed by panels, of which wide ones have several, over two samples."""
    generator = torch.Generator().manual_seed(width)
    samples = torch.randn(2, 40, width, generator=generator)
    sums = torch.zeros(width, width)
    for values in samples:
        STATISTICS["hessian"].add(sums, values)
    tokens = samples.flatten(0, 1).double()
    torch.testing.assert_close(sums.triu().double(), (tokens.T @ tokens).triu(), rtol=0, atol=1e-4)


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
def test_a_store_that_shares_with_the_wrong_layer_is_refused(spec: StoreSpec, owner: str) -> None:
    """Another width, nobody, or one that shares in turn."""
    layers = list(spec.layers)
    name = layers[1].name if owner == "self" else owner
    layers[1] = replace(layers[1], input_of=name)
    with pytest.raises(StoreError, match="cannot share the"):
        replace(spec, layers=tuple(layers))
    with pytest.raises(StoreError, match="cannot share the"):
        StoreSpec.from_json(
            json.loads(json.dumps(spec.to_json() | {"layers": [x.to_json() for x in layers]}))
        )


def test_a_spec_of_before_has_no_sharing(spec: StoreSpec) -> None:
    """Fields with defaults may be missing, others may not."""
    document = json.loads(json.dumps(spec.layers[0].to_json()))
    del document["input_of"]
    assert LayerSpec.from_json(document).input_of is None
    del document["digest"]
    with pytest.raises(StoreError, match="missing or unknown fields: digest"):
        LayerSpec.from_json(document)


def test_a_dead_layer_is_said_and_recorded(shelf: Shelf, tmp_path: Path) -> None:
    """A Hessian of zeros is no silent identity: a note in pruning.json names the layer."""
    shutil.copytree(shelf.root(LLAMA) / "model", tmp_path / "model")
    for path in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("layers.0.mlp.up_proj.weight"):
                tensor.zero_()  # so that down_proj's inputs are zero
        save_file(tensors, path, metadata={"format": "pt"})
    run = LLAMA.collecting(shelf.root(LLAMA), tmp_path / "store", statistics=("hessian",))
    collect(replace(run, model=str(tmp_path / "model")))
    prune(pruning(tmp_path, tmp_path / "out", method="alps"))
    report = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert report["notes"] == [
        "model.layers.0.mlp.down_proj: hessian is all zeros: every direction counts the same"
    ]
    assert report["layers"]["model.layers.0.mlp.down_proj"]["achieved"] == 0.5
