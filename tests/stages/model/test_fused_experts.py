"""Experts that the checkpoint keeps in one tensor: each matrix is a layer, a part of it."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gradpipe import CollectConfig, GradientStore, collect, open_store, prune
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.model.experts import is_split, split_experts
from gradpipe.stages.model.load import build_skeleton
from gradpipe.store.schema import LayerSpec
from tests.support.cases import collecting, pruning
from tests.support.fused import FUSED, NUM_EXPERTS, expected_sums, save_fused
from tests.support.texts import write_text

STATISTICS = ("grad_l1", "act_l2", "hessian")


def config(root: Path, **options: Any) -> CollectConfig:
    """A collection from the model in `root`, in batches of which the last is smaller."""
    settings: dict[str, Any] = {"statistics": STATISTICS, "batch_size": 3}
    return collecting(root, **{**settings, **options})


@pytest.fixture(scope="module", params=FUSED)
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each family and its store."""
    root = tmp_path_factory.mktemp(request.param)
    save_fused(request.param, root / "model")
    write_text(root / "text.txt")
    collect(config(root))
    return root


def part(layer: LayerSpec, tensor: Tensor) -> Tensor:
    """A layer's own matrix (out, in) of a tensor as in the checkpoint."""
    assert layer.part is not None
    index, count = layer.part
    assert count == NUM_EXPERTS
    own = tensor.reshape(count, -1, tensor.shape[-1])[index]
    return own.T if layer.transposed else own


def parts(store: GradientStore) -> list[LayerSpec]:
    """The layers that are parts of a tensor; those of experts all are."""
    layers = [x for x in store.spec.layers if x.part is not None]
    assert len(layers) == NUM_EXPERTS * len({x.weight_key for x in layers})
    return layers


def assert_close(got: Any, expected: Tensor) -> None:
    """Within 2e-5 of the root mean square."""
    rms = float(expected.square().mean().sqrt())
    np.testing.assert_allclose(np.array(got), expected.numpy(), rtol=1e-5, atol=2e-5 * rms)


def test_every_expert_s_sums_are_those_of_transformers_code(root: Path) -> None:
    """Gradients are slices of autograd's, taken by sample; inputs are those of the products."""
    store = open_store(root / "store")
    expected = expected_sums(root / "model", torch.from_numpy(np.array(store.input_ids())))
    assert {x.weight_key for x in parts(store)} == expected.moments.keys()
    for layer in parts(store):
        assert_close(
            store.read_norms(layer, "grad_l1"), part(layer, expected.grad_l1[layer.weight_key])
        )
        assert layer.part is not None
        moments = expected.moments[layer.weight_key][layer.part[0]]
        norms = store.read_norms(layer, "act_l2")
        assert_close(norms, moments.diagonal().sqrt())
        packed = moments[*torch.triu_indices(*moments.shape)]
        assert_close(store.read_norms(layer, "hessian"), packed)


def test_streamed_is_resident_bit_for_bit(root: Path) -> None:
    """Every object of the store has the same bytes under either schedule."""
    streamed = collect(config(root, schedule="streamed", store=root / "streamed"))
    assert streamed.digest == open_store(root / "store").digest


def test_nothing_of_the_blocks_but_routers_and_biases_stays_dense(root: Path) -> None:
    """What `collect-grads` says stays dense holds no expert."""
    said = io.StringIO()
    collect(config(root, store=root / "again"), Console(file=said, width=200))
    for line in said.getvalue().splitlines():
        assert not line.startswith("stays dense") or any(
            word in line for word in ("a bias", "a convolution", "outer", "gate")
        ), line


def test_parts_are_pruned_in_place(root: Path) -> None:
    """Half of each expert's matrix is zero, all else as it was; transformers opens it."""
    prune(pruning(root, root / "out", method="wanda"), Console(file=io.StringIO()))
    dense = load_file(root / "model" / "model.safetensors")
    pruned = load_file(root / "out" / "model.safetensors")
    layers = open_store(root / "store").spec.layers
    for layer in layers:
        is_part = layer.part is not None
        new = part(layer, pruned[layer.weight_key]) if is_part else pruned[layer.weight_key]
        assert int((new == 0).sum()) == pytest.approx(new.numel() / 2, abs=1)
    for key, tensor in pruned.items():
        assert bool(((tensor == dense[key]) | (tensor == 0)).all())
        if key not in {x.weight_key for x in layers}:
            assert torch.equal(tensor, dense[key])
    opened: Any = AutoModelForCausalLM.from_pretrained(root / "out", output_loading_info=True)
    assert not opened[1]["missing_keys"]


def test_weights_changed_under_a_store_are_refused_by_part(root: Path) -> None:
    """Each layer's digest is of its own part."""
    layers = parts(open_store(root / "store"))
    assert len({x.digest for x in layers}) == len(layers)


def test_experts_that_compute_something_else_stay_as_they_are(tmp_path: Path) -> None:
    """A class with the same parameters and another forward is not taken for one that is known."""
    checkpoint = Checkpoint.open(str(save_fused("llama4_text", tmp_path / "model")))
    model, sources = build_skeleton(checkpoint, torch.float32)
    first, second = (block.feed_forward.experts for block in model.model.layers)
    kind = type(second)

    class Odd(kind):  # type: ignore[valid-type,misc]
        def forward(self, hidden_states: Tensor) -> Tensor:
            output: Tensor = 2 * super().forward(hidden_states)
            return output

    second.__class__ = Odd
    split_experts(model, sources)
    assert is_split(first)
    assert not is_split(second)
