"""Stores as files for other tools, read back with those tools' own packages."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from gradpipe import GradientStore, InputError, collect
from gradpipe.pipeline.stores.config import ExportConfig
from gradpipe.pipeline.stores.export import export
from gradpipe.pipeline.stores.imatrix import Imatrix
from gradpipe.store.statistics import STATISTICS
from tests.support.cases import collecting, written
from tests.support.workplace import run_pipe

STORE = Path(__file__).parents[1] / "data" / "store-v2"

# llama.cpp's names of the weights whose inputs differ, by transformers' modules: by hand.
DENSE = {
    "self_attn.q_proj": "attn_q",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
EXPERTS = {
    "mixtral": ("block_sparse_moe", {"w1": "gate", "w3": "up", "w2": "down"}),
    "qwen3_moe": ("mlp", {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}),
}


def exported(store: object, out: Path, form: str, **options: Any) -> Path:
    """Export a store."""
    return export(ExportConfig(store=str(store), out=out, format=form, **options))


def tensors_of(path: Path) -> dict[str, Any]:
    """What llama.cpp's own package reads, in its order of dimensions."""
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    found = {}
    for tensor in reader.tensors:
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        found[tensor.name] = np.array(tensor.data).reshape(tensor.shape[::-1])
    return found


def collected(family: str, root: Path, **changes: Any) -> GradientStore:
    """A store of squared inputs."""
    written(root, family)
    return collect(collecting(root, statistics=("act_l2",), **changes))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_an_importance_matrix_is_the_squared_inputs(family: str, tmp_path: Path) -> None:
    """Under llama.cpp's names, by hooks on the plain model; and how much it was taken over."""
    store = collected(family, tmp_path)
    found = tensors_of(exported(tmp_path / "store", tmp_path / "imatrix.gguf", "imatrix"))
    expected = squared_inputs(tmp_path / "model", store)
    for block in range(2):
        for module, name in DENSE.items():
            sums = found[f"blk.{block}.{name}.weight.in_sum2"]
            assert sums.shape == (1, len(expected[f"{block}.{module}"]))
            np.testing.assert_allclose(sums[0], expected[f"{block}.{module}"], rtol=1e-5)
            assert found[f"blk.{block}.{name}.weight.counts"].tolist() == [[4 * 16]]
    assert len(found) == 2 * len(store.spec.layers)
    assert list(found) == sorted(found, key=lambda x: (x.rpartition(".")[0], x[-1] == "s"))
    fields = gguf.GGUFReader(tmp_path / "imatrix.gguf").fields
    assert fields["imatrix.chunk_count"].contents() == 4
    assert fields["imatrix.chunk_size"].contents() == 16
    assert fields["imatrix.datasets"].contents() == ["text.txt"]


def squared_inputs(model: Path, store: GradientStore) -> dict[str, Any]:
    """Σ x² of every linear layer's inputs, over the store's own samples."""
    plain = AutoModelForCausalLM.from_pretrained(model)
    sums: dict[str, Any] = {}
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:

            def add(_: Any, args: Any, key: str = name.partition(".layers.")[2]) -> None:
                sums[key] = sums.get(key, 0) + args[0].double().square().sum(dim=(0, 1)).numpy()

            module.register_forward_pre_hook(add)
    with torch.no_grad():
        plain(torch.from_numpy(store.input_ids()).long())
    return sums


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_lie_in_one_tensor_with_a_count_each(family: str, tmp_path: Path) -> None:
    """Rows are experts, in order; counts are the tokens routed to each, two experts a token."""
    store = collected(family, tmp_path)
    found = tensors_of(exported(tmp_path / "store", tmp_path / "imatrix.gguf", "imatrix"))
    parent, names = EXPERTS[family]
    for block in range(2):
        for own, name in names.items():
            weight = f"blk.{block}.ffn_{name}_exps.weight"
            assert found[f"{weight}.counts"].shape == (4, 1)
            assert found[f"{weight}.counts"].sum() == 2 * 4 * 16
            for expert in range(4):
                layer = store.spec.layer(f"model.layers.{block}.{parent}.experts.{expert}.{own}")
                assert layer is not None
                norms = store.read_norms(layer, "act_l2")
                sums = found[f"{weight}.in_sum2"][expert]
                np.testing.assert_allclose(sums, norms.astype(np.float64) ** 2, rtol=1e-6)
                count = found[f"{weight}.counts"][expert, 0]
                assert count == store.counts(layer, "act_l2").num_tokens
                assert (count == 0) == (not sums.any())
    again = exported(tmp_path / "store", tmp_path / "again.gguf", "imatrix")
    assert again.read_bytes() == (tmp_path / "imatrix.gguf").read_bytes()
    one = exported(tmp_path / "store", tmp_path / "1.gguf", "imatrix", layer=r"experts\.1\.")
    for name, rows in tensors_of(one).items():  # llama.cpp wants a row for each expert
        assert len(rows) == 4
        assert not np.delete(rows, 1, axis=0).any()
        np.testing.assert_array_equal(rows[1], found[name][1])


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.block_sparse_moe.experts.123456789.w1", None),
        ("model.layers.0.mlp.experts.down_proj.1", (1, 2**30)),
    ],
)
def test_a_store_cannot_ask_for_any_number_of_experts(
    tmp_path: Path, name: str, part: tuple[int, int] | None
) -> None:
    """Each takes a row in the file, stored or not: names and parts are somebody's word."""
    store = collected("mixtral", tmp_path)
    key = name if part is None else name.removesuffix(".1")
    layer = replace(store.spec.layers[0], name=name, weight_key=key, part=part)
    store.spec = replace(store.spec, layers=(*store.spec.layers, layer))
    with pytest.raises(InputError, match=r"one of \d{9,} experts, expected at most 4096"):
        Imatrix.of(store, [layer])


def test_norms_are_read_by_safetensors(tmp_path: Path) -> None:
    """Every statistic, decoded: norms as they are, second moments as whole matrices."""
    store = GradientStore.open(STORE)
    path = exported(STORE, tmp_path / "norms.safetensors", "safetensors")
    with safe_open(path, "numpy") as file:
        for layer in store.spec.layers:
            for name in layer.own(store.spec.statistics):
                got, norms = file.get_tensor(f"{layer.name}.{name}"), store.read_norms(layer, name)
                if STATISTICS[name].is_symmetric:
                    assert (got == got.T).all()
                    got = got[np.triu_indices(len(got))]
                np.testing.assert_array_equal(got, norms, strict=True)
        metadata = file.metadata()
    assert metadata["digest"] == store.digest
    assert json.loads(metadata["gradpipe"])["command"] == store.spec.command
    assert set(json.loads(metadata["num_tokens"]).values()) == {6}


def test_a_part_of_a_store_can_be_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some layers, some statistics, by the command."""
    words = ("store", "export", STORE, tmp_path / "some", "--format", "safetensors")
    options = ("--statistics", "act_l2,grad_l2", "--layer", "gate|up")
    assert run_pipe(monkeypatch, *words, *options) == 0
    assert str(tmp_path / "some") in capsys.readouterr().out.replace("\n", "")
    with safe_open(tmp_path / "some", "numpy") as file:
        assert {name.rpartition(".")[2] for name in file.keys()} == {"act_l2", "grad_l2"}  # noqa: SIM118
        assert {name.split(".")[4] for name in file.keys()} == {"gate_proj", "up_proj"}  # noqa: SIM118


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "imatrix"}, "no names are known for Toy"),
        ({"form": "imatrix", "statistics": ("act_l2",)}, "of act_l2: leave it out"),
        ({"form": "safetensors", "statistics": ("grad_l1",)}, "grad_l2, act_l2, hessian"),
        ({"form": "safetensors", "layer": "decoder"}, "none of 5 layers"),
        ({"form": "npz"}, "expected one of imatrix, safetensors"),
        ({"form": "safetensors", "out": "there"}, "exists"),
        ({"form": "safetensors", "out": "no/such/folder"}, "a folder that exists"),
    ],
)
def test_what_cannot_be_exported_is_the_users_mistake(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    """One line, and no file."""
    (tmp_path / "there").write_text("mine")
    settings = {"out": "new", **options}
    with pytest.raises(InputError, match=words):
        exported(STORE, tmp_path / settings.pop("out"), **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_store_without_inputs_has_no_importance_matrix(workplace: Path, tmp_path: Path) -> None:
    """The line says what to collect."""
    stores = collecting(workplace, tmp_path / "store", statistics=("act_sum",))
    collect(stores)
    with pytest.raises(InputError, match="--statistics act_l2"):
        exported(tmp_path / "store", tmp_path / "out", "imatrix")


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install stands in the line."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "gradpipe.pipeline.stores.imatrix", raising=False)
    with pytest.raises(InputError, match=r"pip install 'gradpipe\[gguf\]'"):
        exported(STORE, tmp_path / "out", "imatrix")


def test_a_shared_moment_is_exported_for_each_layer_that_reads_it(tmp_path: Path) -> None:
    """Of a key projection alone, the Hessian of its input, under the query's name."""
    written(tmp_path, "llama")
    store = collect(collecting(tmp_path, statistics=("act_l2", "hessian")))
    out = exported(store.url, tmp_path / "k", "safetensors", layer=r"layers\.1\..*k_proj")
    block = "model.layers.1.self_attn"
    with safe_open(out, "np") as file:
        assert {*file.keys()} == {f"{block}.k_proj.act_l2", f"{block}.q_proj.hessian"}
