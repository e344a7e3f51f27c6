"""Stage two as a whole: bytes, laws, and what the output folder holds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradpipe import (
    CollectConfig,
    DataConfig,
    EvalConfig,
    InputError,
    PruneConfig,
    Shard,
    collect,
    evaluate,
    prune,
)
from gradpipe.stages.checkpoint.folder import Checkpoint
from tests.support.models import save_tiny
from tests.support.reference import reference_perplexity
from tests.support.texts import write_text


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded tiny Llama, a text, and a store of every statistic."""
    root = tmp_path_factory.mktemp("prune")
    save_tiny("llama", root / "model", max_shard_size="20KB")
    (root / "model" / "LICENSE").write_text("all rights to all\n")
    (root / "model" / "pytorch_model.bin").write_bytes(b"a pickle that must not travel")
    write_text(root / "text.txt")
    collect(
        CollectConfig(
            model=str(root / "model"),
            store=root / "store",
            data=DataConfig(name=str(root / "text.txt")),
            num_samples=4,
            seq_len=16,
            statistics=("grad_l1", "grad_l2", "grad_sum", "act_l2", "act_sum"),
        )
    )
    return root


def config(root: Path, out: Path, **options: object) -> PruneConfig:
    """A run on the fixture's model and store."""
    return PruneConfig(model=str(root / "model"), store=str(root / "store"), out=out, **options)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_three_targets_in_one_pass_write_the_bytes_of_three_passes(
    workplace: Path, tmp_path: Path
) -> None:
    """Sharing one load and one score changes no byte of any file."""
    prune(config(workplace, tmp_path / "all", sparsities=(0.5, 0.7), patterns=("2:4",)))
    prune(config(workplace, tmp_path / "a", sparsities=(0.5,)))
    prune(config(workplace, tmp_path / "b", sparsities=(0.7,)))
    prune(config(workplace, tmp_path / "c", patterns=("2:4",)))
    for label, single in (("s0.50", "a"), ("s0.70", "b"), ("2-4", "c")):
        assert contents(tmp_path / "all" / label) == contents(tmp_path / single)


def test_only_pruned_layers_change_and_kept_weights_do_not(workplace: Path, tmp_path: Path) -> None:
    """Every other tensor, and every kept weight, keeps its bytes; pruned ones are +0.0."""
    (result,) = prune(config(workplace, tmp_path / "out"))
    names = {layer.name for layer in result.layers}
    before, after = Checkpoint.open(str(workplace / "model")), Checkpoint.open(str(result.folder))
    assert after.tensors == before.tensors
    for key, info in before.tensors.items():
        if key.removesuffix(".weight") not in names:
            assert after.read_bytes(key) == before.read_bytes(key)
            continue
        dense, pruned = before.read(key), after.read(key)
        zero = pruned == 0
        assert torch.equal(pruned[~zero], dense[~zero])
        assert not bool(torch.signbit(pruned[zero]).any())
        assert info.shape[1] // 2 * info.shape[0] == int(zero.sum())


def test_the_report_is_what_the_files_hold(workplace: Path, tmp_path: Path) -> None:
    """`pruning.json` gives requested and achieved sparsity of each layer and in total."""
    (result,) = prune(config(workplace, tmp_path / "out", sparsities=(0.3,), group="layer"))
    report = json.loads((tmp_path / "out" / "pruning.json").read_text())
    tensors = {
        k: v for f in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(f).items()
    }
    for name, layer in report["layers"].items():
        weight = tensors[name + ".weight"]
        assert layer["zeros"] == int((weight == 0).sum()) == int(0.3 * weight.numel() + 1e-9)
        assert layer["requested"] == 0.3
    zeros = sum(layer["zeros"] for layer in report["layers"].values())
    total = sum(layer["size"] for layer in report["layers"].values())
    assert report["achieved_sparsity"] == pytest.approx(zeros / total) == result.achieved


def test_the_output_is_complete_and_holds_no_other_weights(workplace: Path, tmp_path: Path) -> None:
    """Config, index, tokenizer and licence travel; pickles do not; nothing else is beside it."""
    prune(config(workplace, tmp_path / "out"))
    source = {p.name for p in (workplace / "model").iterdir()}
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert written == source - {"pytorch_model.bin"} | {"pruning.json", "README.md"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert "sparsity_config" not in (tmp_path / "out" / "config.json").read_text()


def test_a_pruned_model_opens_and_evaluates_as_transformers_sees_it(
    workplace: Path, tmp_path: Path
) -> None:
    """`evaluate` gives the perplexity that a plain loop over the opened model gives."""
    prune(config(workplace, tmp_path / "out"))
    data = DataConfig(name=str(workplace / "text.txt"))
    metrics = evaluate(EvalConfig(model=str(tmp_path / "out"), data=data, seq_len=16, batch_size=3))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = torch.tensor(tokenizer((workplace / "text.txt").read_text())["input_ids"])
    assert metrics.perplexity == pytest.approx(reference_perplexity(model, ids, 16), rel=1e-5)
    assert metrics.num_windows == len(ids) // 16


@pytest.mark.parametrize("group", ["output", "input", "layer", "output:128", "input:128"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "gradient", "gblm"])
def test_every_method_and_group_reaches_its_sparsity(
    workplace: Path, tmp_path: Path, method: str, group: str
) -> None:
    """Read back from the file, each layer has the zeros that were asked for."""
    (result,) = prune(config(workplace, tmp_path / "out", method=method, group=group))
    assert result.achieved == pytest.approx(0.5, abs=0.02)


def test_include_and_exclude_choose_layers(workplace: Path, tmp_path: Path) -> None:
    """Regexes restrict to some layers, or add the head and embeddings for magnitude."""
    (mlp,) = prune(config(workplace, tmp_path / "mlp", include=("mlp",), exclude=("down",)))
    assert {layer.name.split(".")[-1] for layer in mlp.layers} == {"gate_proj", "up_proj"}
    (head,) = prune(
        config(
            workplace, tmp_path / "head", method="magnitude", include=("lm_head", "embed_tokens")
        )
    )
    assert [layer.name for layer in head.layers] == ["lm_head", "model.embed_tokens"]


def test_a_tied_head_is_pruned_once_for_both_uses(tmp_path: Path) -> None:
    """The head's tensor is the embedding's: collected with --include, pruned in one place."""
    save_tiny("gpt2", tmp_path / "model")
    write_text(tmp_path / "text.txt")
    store = collect(
        CollectConfig(
            model=str(tmp_path / "model"),
            store=tmp_path / "store",
            data=DataConfig(name=str(tmp_path / "text.txt")),
            num_samples=2,
            seq_len=8,
            include=("lm_head",),
        )
    )
    heads = [layer for layer in store.spec.layers if layer.block is None]
    assert [head.weight_key for head in heads] == ["transformer.wte.weight"]
    (result,) = prune(config(tmp_path, tmp_path / "out", include=("wte",), sparsities=(0.5,)))
    model: Any = AutoModelForCausalLM.from_pretrained(result.folder)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert float((model.lm_head.weight == 0).float().mean()) == 0.5


def test_overwrite_replaces_the_whole_folder(workplace: Path, tmp_path: Path) -> None:
    """No file of an earlier output survives in a later one."""
    prune(config(workplace, tmp_path / "out", sparsities=(0.5, 0.6)))
    prune(config(workplace, tmp_path / "out", sparsities=(0.5,), overwrite=True))
    assert not (tmp_path / "out" / "s0.50").exists()
    assert (tmp_path / "out" / "config.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_shards_write_the_bytes_of_one_run(workplace: Path, tmp_path: Path) -> None:
    """The shard that completes the files publishes; until then OUT is not there."""
    prune(config(workplace, tmp_path / "whole", sparsities=(0.5, 0.6)))
    for index in (2, 0, 1):
        assert not (tmp_path / "out").exists()
        results = prune(
            config(workplace, tmp_path / "out", sparsities=(0.5, 0.6), shard=Shard(index, 3))
        )
    assert [result.label for result in results] == ["s0.50", "s0.60"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "whole"}


def test_a_shard_that_is_run_again_finishes_its_files(workplace: Path, tmp_path: Path) -> None:
    """A file that a killed shard left without its record is written anew."""
    prune(config(workplace, tmp_path / "whole"))
    prune(config(workplace, tmp_path / "out", shard=Shard(0, 2)))
    record = next((tmp_path / ".out.shards").glob("*.safetensors.json"))
    record.unlink()
    prune(config(workplace, tmp_path / "out", shard=Shard(1, 2)))
    assert not (tmp_path / "out").exists()
    prune(config(workplace, tmp_path / "out", shard=Shard(0, 2)))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_shards_of_two_commands_do_not_mix(workplace: Path, tmp_path: Path) -> None:
    """A shard that would prune otherwise than those before it is refused."""
    prune(config(workplace, tmp_path / "out", shard=Shard(0, 2)))
    with pytest.raises(InputError, match="another prune command"):
        prune(config(workplace, tmp_path / "out", method="wanda", shard=Shard(1, 2)))
