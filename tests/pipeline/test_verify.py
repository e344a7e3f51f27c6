"""`pipe verify`: what pruning writes passes, and each thing that can be wrong is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradpipe import (
    GradpipeError,
    InputError,
    apply_masks,
    collect,
    export_masks,
    prune,
    verify,
)
from tests.support.cases import collecting, pruning, tensors_of, written
from tests.support.models import save_tiny
from tests.support.workplace import Pipe, Refused, edit_config, edit_weights

KEY = "model.layers.0.self_attn.q_proj.weight"
LAYER = KEY.removesuffix(".weight")


def pruned(root: Path, family: str, **options: Any) -> Path:
    """A tiny model and its store, pruned into `root/out`."""
    written(root, family, **options.pop("model", {}))
    collect(collecting(root, statistics=("act_l2", "hessian", "grad_l1")))
    prune(pruning(root, root / "out", **options))
    return root / "out"


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"method": "wanda", "patterns": ("2:4",)}),
        ("llama", {"method": "sparsegpt", "sparsities": (0.5,)}),
        ("llama", {"method": "wanda", "update": "obs", "model": {"max_shard_size": "20KB"}}),
        ("gpt2", {"method": "gblm", "patterns": ("4:8",)}),  # layers are (in, out)
        ("mixtral", {"method": "wanda", "sparsities": (0.6,)}),  # experts
        ("llama", {"method": "magnitude", "include": ("lm_head", "embed_tokens")}),
    ],
)
def test_what_pruning_writes_is_verified(
    tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    """Alone and beside the dense model, whatever was done to the weights that stay."""
    out = pruned(tmp_path, family, **options)
    alone, beside = verify(str(out)), verify(str(out), str(tmp_path / "model"))
    assert alone.num_layers == beside.num_layers > 0
    assert beside.num_tensors == len(list(tensors_of(tmp_path / "model")))


def test_a_tensor_without_values_is_no_layer_and_is_verified(tmp_path: Path) -> None:
    """It has no bytes to compare, no zeros to count, and nothing to prune."""
    written(tmp_path, "llama")
    edit_weights(tmp_path / "model", lambda x: x.update({"extra.weight": torch.empty(0, 3)}))
    collect(collecting(tmp_path, statistics=("act_l2",)))
    prune(pruning(tmp_path, tmp_path / "out", method="wanda"))
    assert verify(str(tmp_path / "out"), str(tmp_path / "model")).num_layers == 14
    export_masks(str(tmp_path / "out"), tmp_path / "masks.safetensors")
    apply_masks(str(tmp_path / "model"), tmp_path / "masks.safetensors", tmp_path / "again")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and `out`, which is 2:4 sparse by Wanda."""
    root = tmp_path_factory.mktemp("verify")
    pruned(root, "llama", method="wanda", patterns=("2:4",))
    return root


def move_a_zero(weight: torch.Tensor) -> None:
    """The same number of zeros, three kept of one group and one of its neighbour."""
    first, second = weight[0, :4], weight[0, 4:8]
    empty, kept = (first == 0).nonzero()[0], (second != 0).nonzero()[0]
    first[empty], second[kept] = 1.0, 0.0


def put(value: float, *, where: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    """Set the first value that `where` is true for."""

    def edit(weight: torch.Tensor) -> None:
        row, column = where(weight).nonzero()[0]
        weight[row, column] = value

    return edit


def is_zero(weight: torch.Tensor) -> torch.Tensor:
    """Where values are zero."""
    return weight == 0


def is_kept(weight: torch.Tensor) -> torch.Tensor:
    """Where values are not zero."""
    return weight != 0


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (put(0.5, where=is_zero), r"has \d+ zeros of 1024, recorded are 512"),
        (put(0.0, where=is_kept), r"has 513 zeros of 1024, recorded are 512"),
        (move_a_zero, r"is not 2:4 sparse"),
        (put(torch.nan, where=is_kept), r"holds NaN or infinite values"),
        (put(torch.inf, where=is_kept), r"holds NaN or infinite values"),
    ],
)
def test_a_layer_that_is_otherwise_is_named(
    made: Path, tmp_path: Path, edit: Callable[[torch.Tensor], None], says: str
) -> None:
    """Zeros that came or went, a broken pattern and NaN are seen without the dense model."""
    out = shutil.copytree(made / "out", tmp_path / "out")
    edit_weights(out, lambda x: edit(x[KEY]))
    with pytest.raises(GradpipeError, match=rf"{LAYER}.* {says}"):
        verify(str(out))


def test_a_kept_weight_that_changed_is_seen_beside_the_base(made: Path, tmp_path: Path) -> None:
    """By the last bit of one value; alone the checkpoint is as good as any."""
    out = shutil.copytree(made / "out", tmp_path / "out")

    def nudge(weights: dict[str, torch.Tensor]) -> None:
        row, column = is_kept(weights[KEY]).nonzero()[0]
        weights[KEY].view(torch.int32)[row, column] += 1

    edit_weights(out, nudge)
    verify(str(out))
    with pytest.raises(GradpipeError, match=rf"{LAYER} differs from the base's in 1 weights"):
        verify(str(out), str(made / "model"))


def test_a_negative_zero_is_seen_beside_the_base(made: Path, tmp_path: Path) -> None:
    """Pruning writes +0.0."""
    out = shutil.copytree(made / "out", tmp_path / "out")
    edit_weights(out, lambda x: put(-0.0, where=is_zero)(x[KEY]))
    with pytest.raises(GradpipeError, match=rf"{LAYER} holds −0.0 in 1 places"):
        verify(str(out), str(made / "model"))


def test_the_dense_model_may_hold_negative_zeros(tmp_path: Path) -> None:
    """As one does whose weights were multiplied with a mask; what stays of it keeps its bytes."""
    written(tmp_path, "llama")
    edit_weights(tmp_path / "model", lambda x: x[KEY][:, ::3].mul_(0))
    collect(collecting(tmp_path, statistics=("act_l2",)))
    prune(pruning(tmp_path, tmp_path / "out", method="wanda", sparsities=(0.2,)))
    weight = dict(tensors_of(tmp_path / "out"))[KEY]
    assert (weight.view(torch.int32) == torch.iinfo(torch.int32).min).any()
    verify(str(tmp_path / "out"))
    verify(str(tmp_path / "out"), str(tmp_path / "model"))


@pytest.mark.parametrize("options", [{"method": "alps"}, {"method": "wanda", "update": "obs"}])
def test_an_update_that_rounds_to_nothing_leaves_plus_zero(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Float16 has no number for what the update makes of tiny weights."""
    written(tmp_path, "llama")
    weights = load_file(tmp_path / "model/model.safetensors")
    tiny = {k: (3e-7 * x if ".gate_proj." in k else x).half() for k, x in weights.items()}
    save_file(tiny, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    collect(collecting(tmp_path, statistics=("act_l2", "hessian")))
    prune(pruning(tmp_path, tmp_path / "out", sparsities=(0.5,), **options))
    verify(str(tmp_path / "out"), str(tmp_path / "model"))


def test_the_folder_of_several_targets_is_told_what_is_in_it(tmp_path: Path) -> None:
    """It is no checkpoint."""
    pruned(tmp_path, "llama", method="magnitude", sparsities=(0.5,), patterns=("2:4",))
    with pytest.raises(
        InputError, match=r"no config\.json: give one of the 2 in it, such as .*2-4"
    ):
        verify(str(tmp_path / "out"))


def test_another_tensor_that_changed_is_seen_beside_the_base(made: Path, tmp_path: Path) -> None:
    """A norm's weight is no layer, and pruning leaves it alone."""
    out = shutil.copytree(made / "out", tmp_path / "out")
    edit_weights(out, lambda x: x["model.norm.weight"].add_(1))
    with pytest.raises(GradpipeError, match=r"model\.norm\.weight differs from the base's"):
        verify(str(out), str(made / "model"))


def test_a_tensor_that_is_no_layer_may_not_gain_zeros(made: Path, tmp_path: Path) -> None:
    """The file's own sparsity is recorded too."""
    out = shutil.copytree(made / "out", tmp_path / "out")
    edit_weights(out, lambda x: x["model.norm.weight"].mul_(0))
    with pytest.raises(GradpipeError, match=r"the file's sparsity is .*, recorded is"):
        verify(str(out))


def test_tensors_of_another_model_are_named(made: Path, tmp_path: Path) -> None:
    """A base of other shapes, and one with other tensors."""
    other = save_tiny("qwen3", tmp_path / "other")
    with pytest.raises(GradpipeError, match=r"k_norm\.weight: none here, F32 \(16,\) in .*other"):
        verify(str(made / "out"), str(other))


def test_a_head_that_the_config_ties_must_be_the_embedding(made: Path, tmp_path: Path) -> None:
    """Both are in the files, equal or not: only when they are equal, the model is what is read."""
    out = shutil.copytree(made / "out", tmp_path / "out")
    edit_config(out, tie_word_embeddings=True)
    with pytest.raises(GradpipeError, match=r"lm_head.weight is not .*embed_tokens.weight"):
        verify(str(out))
    edit_weights(out, lambda x: x["lm_head.weight"].copy_(x["model.embed_tokens.weight"]))
    verify(str(out))
    with pytest.raises(GradpipeError, match=r"lm_head\.weight differs from the base's"):
        verify(str(out), str(made / "model"))


def test_an_index_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    """Transformers would not look for it, nor find what is not there."""
    out = pruned(tmp_path, "llama", method="magnitude", model={"max_shard_size": "20KB"})
    index = out / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    file = document["weight_map"].pop(KEY)
    index.write_text(json.dumps(document))
    with pytest.raises(GradpipeError, match=rf"{KEY} is in {file}, and .* does not name it"):
        verify(str(out))
    weights = load_file(out / file)
    save_file({k: x for k, x in weights.items() if k != KEY}, out / file)
    document["weight_map"][KEY] = file
    index.write_text(json.dumps(document))
    with pytest.raises(GradpipeError, match=rf"{KEY} is in {file}, which does not hold it"):
        verify(str(out))


def test_a_model_without_a_record_is_refused(made: Path, tmp_path: Path) -> None:
    """A dense model has none; a damaged one is no record."""
    with pytest.raises(InputError, match=r"has no pruning\.json"):
        verify(str(made / "model"))
    out = shutil.copytree(made / "out", tmp_path / "out")
    for text in ("", "[]", "{}", '{"layers": {"a": 1}}'):
        (out / "pruning.json").write_text(text)
        with pytest.raises(InputError, match=r"is not what pipe prune wrote"):
            verify(str(out))


def test_the_command_says_one_line(pipe: Pipe) -> None:
    """What was found, and what it was held against."""
    pipe("collect-grads model store --dataset text.txt --seq-len 16 --num-samples 2")
    pipe("prune model store out --method wanda")
    assert "14 layers as pruning.json records, and of the weights of model" in pipe(
        "verify out --base model"
    )


def test_the_command_tells_by_its_exit_code(made: Path, tmp_path: Path, refused: Refused) -> None:
    """1 for a checkpoint that is not as recorded, 2 for what is none."""
    out = shutil.copytree(made / "out", tmp_path / "out")
    edit_weights(out, lambda x: x[KEY].mul_(0))
    refused(f"verify {out}", code=1, says=(LAYER, "more)"))
    refused("verify model", says=("pruning.json",))
    refused("verify nothing", says=("nothing",))
