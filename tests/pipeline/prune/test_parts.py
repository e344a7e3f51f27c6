"""Layers that are parts of one tensor: pruned as if each had a tensor of its own."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradpipe import InputError, PruneConfig, collect, open_store, prune
from gradpipe.store.schema import LayerSpec
from gradpipe.store.writer import StoreWriter
from tests.support.cases import collecting, pruning, written

FUSED = {"down_proj": torch.stack, "up_proj": torch.cat, "gate_proj": torch.cat}  # 3-D; 2-D


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts with a tensor each, and with fused ones; a store for either."""
    root = written(tmp_path_factory.mktemp("parts"), "qwen3_moe", num_hidden_layers=1)
    collect(collecting(root))
    (root / "fused").mkdir()
    (root / "fused" / "config.json").write_bytes((root / "model" / "config.json").read_bytes())
    tensors = load_file(root / "model" / "model.safetensors")
    for name, join in FUSED.items():
        keys = [f"model.layers.0.mlp.experts.{i}.{name}.weight" for i in range(4)]
        tensors[f"model.layers.0.mlp.experts.{name}"] = join([tensors.pop(key) for key in keys])
    save_file(tensors, root / "fused" / "model.safetensors")
    _write_fused_store(root)
    return root


def _fused(layer: LayerSpec) -> LayerSpec:
    """The same layer as a part of the fused tensor."""
    if ".experts." not in layer.name:
        return replace(layer, input_of=None)
    head, index, name = layer.name.rsplit(".", 2)
    return replace(
        layer,
        name=f"{head}.{name}.{index}",
        weight_key=f"{head}.{name}",
        part=(int(index), 4),
        input_of=None,
    )


def _write_fused_store(root: Path) -> None:
    """The store's statistics under the parts' names."""
    store = open_store(root / "store")
    layers = tuple(map(_fused, store.spec.layers))
    writer = StoreWriter(root / "fused-store", replace(store.spec, layers=layers, couplings=()))
    writer.begin(store.calibration())
    for layer, part in zip(store.spec.layers, layers, strict=True):
        writer.write_encoded(part, store.read(layer, store.spec.statistics))
    writer.commit()


def config(root: Path, kind: str, out: Path, **options: Any) -> PruneConfig:
    """A run on the plain or the fused model."""
    settings: dict[str, Any] = {"sparsities": (0.5, 0.3), "method": "wanda"}
    if kind == "fused":
        settings |= {"model": str(root / "fused"), "store": str(root / "fused-store")}
    return pruning(root, out, **settings | options)


@pytest.mark.parametrize(
    "options", [{}, {"allocation": "owl", "group": "layer"}, {"method": "ria"}], ids=str
)
def test_parts_are_pruned_as_tensors_of_their_own(
    root: Path, tmp_path: Path, options: dict[str, str]
) -> None:
    """The same weights and zeros, expert by expert, stacked or one below the other."""
    plain = prune(config(root, "plain", tmp_path / "plain", **options))
    fused = prune(config(root, "fused", tmp_path / "fused", **options))
    for one, other in zip(plain, fused, strict=True):
        expected = load_file(one.folder / "model.safetensors")
        found = load_file(other.folder / "model.safetensors")
        for name in FUSED:
            tensor = found.pop(f"model.layers.0.mlp.experts.{name}")
            for i, part in enumerate(tensor.reshape(-1, tensor.shape[-1]).chunk(4)):
                key = f"model.layers.0.mlp.experts.{i}.{name}.weight"
                assert torch.equal(part, expected.pop(key)), key
        assert all(torch.equal(found[key], expected.pop(key)) for key in found)
        assert not expected
        zeros = {_fused_name(x.name): x.zeros for x in one.layers}
        assert zeros == {x.name: x.zeros for x in other.layers}


def _fused_name(name: str) -> str:
    head, _, rest = name.partition(".experts.")
    return f"{head}.experts.{'.'.join(reversed(rest.split('.')))}" if rest else name


def test_one_part_can_be_pruned_alone(root: Path, tmp_path: Path) -> None:
    """The other experts in its tensor keep their bytes, and the report names the part."""
    name = "model.layers.0.mlp.experts.down_proj.2"
    [result] = prune(
        config(root, "fused", tmp_path / "out", sparsities=(0.5,), include=(f"{name}$",))
    )
    before = load_file(root / "fused" / "model.safetensors")[name.removesuffix(".2")]
    after = load_file(result.folder / "model.safetensors")[name.removesuffix(".2")]
    changed = [i for i in range(4) if not torch.equal(before[i], after[i])]
    assert changed == [2]
    assert int((after[2] == 0).sum()) == after[2].numel() // 2
    assert list(json.loads((tmp_path / "out" / "pruning.json").read_text())["layers"]) == [name]


def test_a_checkpoint_with_other_parts_is_refused(root: Path, tmp_path: Path) -> None:
    """A tensor that does not divide as the store says is of another model."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((root / "fused" / "config.json").read_bytes())
    tensors = load_file(root / "fused" / "model.safetensors")
    key = "model.layers.0.mlp.experts.down_proj"
    tensors[key] = tensors[key][:3].contiguous()
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(InputError, match="has no part 0 of 4"):
        prune(config(root, "fused", tmp_path / "out", model=str(model)))
