"""Masks on their own: what goes out comes back, on whatever the weights have become."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from gradpipe import InputError, apply_masks, collect, export_masks, prune, verify
from gradpipe.masks import read_masks
from tests.support.cases import collecting, pruning, tensors_of, written
from tests.support.fused import save_fused
from tests.support.models import save_tiny
from tests.support.texts import write_text
from tests.support.workplace import Refused, contents, edit_weights

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module", params=["llama", "mixtral", "gpt2"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files, `out`, which is pruned, and `tuned`, whose weights are others."""
    root = written(tmp_path_factory.mktemp("masks"), request.param, max_shard_size="20KB")
    collect(collecting(root, statistics=("act_l2",)))
    prune(pruning(root, root / "out", method="wanda", sparsities=(0.7,)))
    save_tiny(request.param, root / "tuned", seed=1)
    export_masks(str(root / "out"), root / "masks.safetensors")
    return root


def test_masks_are_bits(made: Path) -> None:
    """An eighth of a byte a weight, as NumPy unpacks them; nothing but where weights are."""
    weights = tensors_of(made / "out")
    with safe_open(made / "masks.safetensors", framework="numpy") as file:
        shapes = json.loads(file.metadata()["shapes"])
        assert shapes.keys() == set(file.keys())
        for key, shape in shapes.items():
            bits = np.unpackbits(file.get_tensor(key), count=np.prod(shape)).reshape(shape)
            assert np.array_equal(bits, weights[key].numpy() != 0)
    layers = json.loads((made / "out" / "pruning.json").read_text())["layers"]
    num_weights = sum(x["size"] for x in layers.values())
    own = sum(-(-np.prod(shape) // 8) for shape in shapes.values())
    assert own == num_weights / 8


def test_another_checkpoint_gets_the_zeros_and_nothing_else(made: Path, tmp_path: Path) -> None:
    """Zeros where the pruned one has them; every other value and tensor as it was, to the bit."""
    file, out = str(made / "masks.safetensors"), str(tmp_path / "new")  # text is a path, too
    result = apply_masks(str(made / "tuned"), file, out)
    masks = read_masks(made / "masks.safetensors")
    before, after = tensors_of(made / "tuned"), tensors_of(tmp_path / "new")
    assert before.keys() == after.keys()
    for key, weight in before.items():
        expected = torch.where(masks[key], weight, torch.zeros(())) if key in masks else weight
        assert torch.equal(after[key].view(torch.int32), expected.view(torch.int32))
    assert result.achieved == pytest.approx(0.7, abs=0.03)
    verify(str(tmp_path / "new"), str(made / "tuned"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "new")


def test_of_experts_in_one_tensor_those_that_were_pruned_alone_are_masked(tmp_path: Path) -> None:
    """Be the others of the pruned checkpoint zero as they may."""
    key = "model.layers.0.mlp.experts.gate_up_proj"
    save_fused("gpt_oss", tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "tuned")
    edit_weights(tmp_path / "model", lambda x: x[key][0].zero_())
    write_text(tmp_path / "text.txt")
    collect(collecting(tmp_path, statistics=("act_l2",)))
    prune(pruning(tmp_path, tmp_path / "out", method="magnitude", include=(rf"{key}\.3$",)))
    export_masks(str(tmp_path / "out"), tmp_path / "masks")
    apply_masks(str(tmp_path / "tuned"), tmp_path / "masks", tmp_path / "new")
    zeros = (tensors_of(tmp_path / "new")[key] == 0).flatten(1).float().mean(1)
    assert zeros.tolist() == [0, 0, 0, 0.5]
    verify(str(tmp_path / "new"), str(tmp_path / "tuned"))


def test_a_pruned_checkpoint_with_its_own_masks_is_itself(made: Path, tmp_path: Path) -> None:
    """Byte for byte, all its files."""
    apply_masks(str(made / "out"), made / "masks.safetensors", tmp_path / "again")
    for path in (made / "out").glob("*.safetensors"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    shares = [
        [json.loads((folder / "pruning.json").read_text())[f"{of}_sparsity"] for of in KINDS]
        for folder in (made / "out", tmp_path / "again")
    ]
    assert shares[0] == shares[1]


KINDS = ("requested", "achieved", "blocks", "file")


def test_masks_are_the_same_bytes_each_time(made: Path, tmp_path: Path) -> None:
    """And those taken from what they were put on are the same bits."""
    first, second = (made / "masks.safetensors", tmp_path / "second.safetensors")
    export_masks(str(made / "out"), str(second))
    assert first.read_bytes() == second.read_bytes()
    apply_masks(str(made / "tuned"), first, tmp_path / "new")
    export_masks(str(tmp_path / "new"), tmp_path / "third.safetensors")
    third = read_masks(tmp_path / "third.safetensors")
    for name, mask in read_masks(first).items():
        assert torch.equal(third[name], mask)


@pytest.fixture
def files(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Masks of the workplace's model, and the checkpoint that they are of."""
    root = tmp_path_factory.mktemp("files")
    prune(pruning(workplace, root / "out", method="magnitude"))
    export_masks(str(root / "out"), root / "masks.safetensors")
    yield root
    shutil.rmtree(root)


def test_what_is_no_file_of_masks_is_refused(files: Path, refused: Refused) -> None:
    """Another safetensors file, one cut off, one whose bits are others: nothing is written."""
    good = files / "masks.safetensors"
    refused("mask apply model none.safetensors new", says=("no such file",))
    refused("mask apply model text.txt new", says=("is no whole file of masks",))
    refused("mask apply model model/model.safetensors new", says=("its format is pt",))
    data = bytearray(good.read_bytes())
    (files / "cut").write_bytes(data[:-1])
    refused(f"mask apply model {files}/cut new", says=("is no whole file of masks",))
    data[-1] ^= 1
    (files / "bits").write_bytes(data)
    refused(f"mask apply model {files}/bits new", says=("is damaged",))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("shapes", lambda x: x | {LAYER + ".weight": [32, 33]}),
        ("shapes", lambda x: x | {LAYER + ".weight": [-32, -32]}),
        ("shapes", lambda x: x | {LAYER + ".weight": [math.inf]}),
        ("shapes", lambda _: []),
        ("digests", lambda _: {}),
        ("report", lambda _: []),
        ("report", lambda x: x | {"layers": {}}),
        ("report", lambda x: x | {"dense_weights": {"a": math.inf}}),
        ("report", lambda x: {k: v for k, v in x.items() if k != "store"}),
        ("report", lambda x: x | {"layers": {"elsewhere": x["layers"][LAYER]}}),
    ],
)
def test_metadata_that_lie_are_refused(
    files: Path, refused: Refused, name: str, change: Any
) -> None:
    """A mask of another shape, none, or a record of nothing."""
    with safe_open(files / "masks.safetensors", framework="pt") as file:
        metadata = file.metadata()
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    metadata[name] = json.dumps(change(json.loads(metadata[name])))
    save_file(weights, files / "lies", metadata)
    refused(f"mask apply model {files}/lies new")


def test_metadata_that_nest_without_end_are_refused(files: Path, refused: Refused) -> None:
    """Python's parser of JSON gives up on them."""
    with safe_open(files / "masks.safetensors", framework="pt") as file:
        metadata = file.metadata() | {"report": "[" * 100_000}
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    save_file(weights, files / "deep", metadata)
    refused(f"mask apply model {files}/deep new", says=("is no whole file of masks",))


def test_masks_of_another_model_are_refused(files: Path, refused: Refused) -> None:
    """By its tensor's name."""
    masks = files / "masks.safetensors"
    says = ("model.layers.0.", "give a checkpoint of the model that was pruned")
    refused(f"mask apply other-shapes {masks} new", says=says)
    refused(f"mask apply other-names {masks} new", says=says)
    refused(f"mask apply model {masks} foreign", says=("OUT foreign exists",))


def test_export_refuses_what_it_cannot_take_or_would_overwrite(
    files: Path, refused: Refused
) -> None:
    """A dense model, a file that is there, a folder that is not, a record of other layers."""
    refused("mask export model new", says=("has no pruning.json",))
    refused(f"mask export {files}/out text.txt", says=("expected a new file",))
    refused(f"mask export {files}/out nowhere/new", says=("in a folder that exists",))
    edit_weights(files / "out", lambda x: x.pop(LAYER + ".weight"))
    refused(f"mask export {files}/out new", says=(f"has no layer {LAYER}",))


def test_an_error_leaves_nothing_behind(files: Path, tmp_path: Path) -> None:
    """Damage that shows as the last mask is read: OUT is not there, nor what would have been."""
    masks = files / "masks.safetensors"
    data = bytearray(masks.read_bytes())
    data[-1] ^= 1
    masks.write_bytes(data)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="damaged"):
        apply_masks(str(files / "out"), masks, tmp_path / "new")
    assert contents(tmp_path) == before
