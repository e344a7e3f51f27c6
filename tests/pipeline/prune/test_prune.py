"""Stage two as a whole: bytes, laws, and what the output folder holds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gradpipe import InputError, Shard, collect, prune
from tests.support.cases import collecting, files_of, pruning, tensors_of, written
from tests.support.models import save_tiny
from tests.support.texts import write_text


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded tiny Llama, a text, and a store of every statistic."""
    root = tmp_path_factory.mktemp("prune")
    save_tiny("llama", root / "model", max_shard_size="20KB")
    (root / "model" / "LICENSE").write_text("all rights to all\n")
    (root / "model" / "pytorch_model.bin").write_bytes(b"a pickle that must not travel")
    write_text(root / "text.txt")
    statistics = ("grad_l1", "grad_l2", "grad_sum", "act_l2", "act_sum")
    collect(collecting(root, statistics=statistics, encoding="compact"))
    return root


def test_the_report_is_what_the_files_hold(workplace: Path, tmp_path: Path) -> None:
    """`pruning.json` gives requested and achieved sparsity of each layer and in total."""
    (result,) = prune(pruning(workplace, tmp_path / "out", sparsities=(0.3,), group="layer"))
    report = json.loads((tmp_path / "out" / "pruning.json").read_text())
    tensors = tensors_of(tmp_path / "out")
    for name, layer in report["layers"].items():
        weight = tensors[name + ".weight"]
        assert layer["zeros"] == int((weight == 0).sum()) == int(0.3 * weight.numel() + 1e-9)
        assert layer["requested"] == 0.3
    zeros = sum(layer["zeros"] for layer in report["layers"].values())
    total = sum(layer["size"] for layer in report["layers"].values())
    assert report["achieved_sparsity"] == pytest.approx(zeros / total) == result.achieved


def test_the_output_is_complete_and_holds_no_other_weights(workplace: Path, tmp_path: Path) -> None:
    """Config, index, tokenizer and licence travel; pickles do not; nothing else is beside it."""
    prune(pruning(workplace, tmp_path / "out"))
    source = {p.name for p in (workplace / "model").iterdir()}
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert written == source - {"pytorch_model.bin"} | {"pruning.json", "README.md"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert "sparsity_config" not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("group", ["output", "input", "layer", "output:128", "input:128"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "gradient", "gblm"])
def test_every_method_and_group_reaches_its_sparsity(
    workplace: Path, tmp_path: Path, method: str, group: str
) -> None:
    """Read back from the file, each layer has the zeros that were asked for."""
    (result,) = prune(pruning(workplace, tmp_path / "out", method=method, group=group))
    assert result.achieved == pytest.approx(0.5, abs=0.02)


def test_include_and_exclude_choose_layers(workplace: Path, tmp_path: Path) -> None:
    """Regexes restrict to some layers, or add the head and embeddings for magnitude."""
    (mlp,) = prune(pruning(workplace, tmp_path / "mlp", include=("mlp",), exclude=("down",)))
    assert {layer.name.split(".")[-1] for layer in mlp.layers} == {"gate_proj", "up_proj"}
    (head,) = prune(
        pruning(
            workplace, tmp_path / "head", method="magnitude", include=("lm_head", "embed_tokens")
        )
    )
    assert [layer.name for layer in head.layers] == ["lm_head", "model.embed_tokens"]


def test_a_head_in_a_sequence_can_be_included_and_no_other_list(tmp_path: Path) -> None:
    """`mlp` means the store's blocks, not those of a tower or of more heads that lie beside."""
    written(tmp_path)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    up = tensors["model.layers.0.mlp.up_proj.weight"]
    towers = ("vision.mlp.0", "vision.blocks.0.mlp.0", "vision.head.mlp.fc1")
    beside = ("mtp.layers.0.mlp.up_proj", *towers, "score.0")
    save_file(tensors | {f"{name}.weight": up.clone() for name in beside}, file, {"format": "pt"})
    collect(collecting(tmp_path, num_samples=2, seq_len=8))
    wish = pruning(tmp_path, tmp_path / "out", method="magnitude", include=("mlp", "score"))
    (result,) = prune(wish)
    assert {x.name for x in result.layers if "model.layers" not in x.name} == {"score.0"}
    pruned = load_file(result.folder / "model.safetensors")
    for name in beside[:-1]:
        assert torch.equal(pruned[f"{name}.weight"], up)


def test_a_tied_head_is_pruned_once_for_both_uses(tmp_path: Path) -> None:
    """Its gradient would be in part the embedding's, so it has none: pruned by magnitude, once."""
    written(tmp_path, "gpt2")
    run = collecting(tmp_path, num_samples=2, seq_len=8)
    with pytest.raises(InputError, match="lm_head is no layer: its tensor is used by several"):
        collect(replace(run, include=("lm_head",)))
    collect(run)
    wish = pruning(
        tmp_path, tmp_path / "out", method="magnitude", include=("wte",), sparsities=(0.5,)
    )
    (result,) = prune(wish)
    model: Any = AutoModelForCausalLM.from_pretrained(result.folder)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert float((model.lm_head.weight == 0).float().mean()) == 0.5


def test_overwrite_replaces_the_whole_folder(workplace: Path, tmp_path: Path) -> None:
    """No file of an earlier output survives in a later one."""
    prune(pruning(workplace, tmp_path / "out", sparsities=(0.5, 0.6)))
    prune(pruning(workplace, tmp_path / "out", sparsities=(0.5,), overwrite=True))
    assert not (tmp_path / "out" / "s0.50").exists()
    assert (tmp_path / "out" / "config.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_shard_that_is_run_again_finishes_its_files(workplace: Path, tmp_path: Path) -> None:
    """A file that a killed shard left without its record is written anew."""
    prune(pruning(workplace, tmp_path / "whole"))
    prune(pruning(workplace, tmp_path / "out", shard=Shard(0, 2)))
    record = next((tmp_path / ".out.shards").glob("*.safetensors.json"))
    record.unlink()
    prune(pruning(workplace, tmp_path / "out", shard=Shard(1, 2)))
    assert not (tmp_path / "out").exists()
    prune(pruning(workplace, tmp_path / "out", shard=Shard(0, 2)))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_shards_of_two_commands_do_not_mix(workplace: Path, tmp_path: Path) -> None:
    """A shard that would prune otherwise than those before it is refused."""
    prune(pruning(workplace, tmp_path / "out", shard=Shard(0, 2)))
    with pytest.raises(InputError, match="another prune command"):
        prune(pruning(workplace, tmp_path / "out", method="wanda", shard=Shard(1, 2)))
