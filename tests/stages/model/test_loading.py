"""A model loaded part by part, as `from_pretrained` loads it at once; and what neither can load."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from gradpipe.errors import InputError
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.collect.block_weights import WeightLoader
from gradpipe.stages.model.buffers import fill_buffers
from gradpipe.stages.model.load import load_model, resolve_dtype
from gradpipe.stages.model.skeleton import take_apart
from tests.support.architectures import save_architecture
from tests.support.models import save_tiny
from tests.support.workplace import edit_config, edit_weights

CPU = torch.device("cpu")

TYPES = {  # what is special about them -> their type and class
    "named by the class of the file": ("gemma3", None),
    "experts merged, one class of block in two": ("jamba", None),
    "experts without a gate": ("nemotron_h", None),
    "several tensors in the file, one in the model": ("olmo_hybrid", None),
    "the text part of an image-text model": ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    "fused experts": ("llama4_text", None),
    "buffers scaled by their owner's owner": ("falcon_h1", None),
    "buffers of the config": ("gemma3n_text", None),
    "weights shared by blocks": ("zamba2", None),
}


def tensors(model: Any) -> dict[str, Tensor]:
    """All parameters and buffers of a model, by name."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


@pytest.mark.parametrize("special", TYPES)
def test_part_by_part_is_from_pretrained(special: str, tmp_path: Path) -> None:
    """Every weight and every buffer, block by block, to the bit."""
    model_type, kind = TYPES[special]
    folder = save_architecture(model_type, tmp_path / "model", kind=kind)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    whole, report = loaded
    assert not report["missing_keys"]
    expected = tensors(whole)
    skeleton = take_apart(Checkpoint.open(str(folder)), torch.float32)
    loader = WeightLoader(skeleton, CPU)
    found: dict[str, Tensor] = {}
    outside = skeleton.blocks.path + "."
    with loader.loaded("", excluded=outside):
        found |= {k: v for k, v in tensors(skeleton.model).items() if not k.startswith(outside)}
    for path in skeleton.blocks.paths:
        with loader.loaded(path + "."):
            inside = tensors(skeleton.model).items()
            found |= {k: v for k, v in inside if k.startswith(path + ".")}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


def test_what_stays_in_float32_does_so_in_both_schedules(tmp_path: Path) -> None:
    """Transformers keeps some weights wide whatever type is asked for."""
    folder = save_architecture("hy_v3", tmp_path / "model")
    checkpoint = Checkpoint.open(str(folder))
    resident = load_model(checkpoint, torch.bfloat16, CPU).state_dict()
    skeleton = take_apart(checkpoint, torch.bfloat16).model.state_dict()
    assert {k: v.dtype for k, v in skeleton.items()} == {k: v.dtype for k, v in resident.items()}
    assert {v.dtype for v in resident.values()} == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_without_a_type_in_its_config_a_model_has_that_of_its_first_weight(
    tmp_path: Path, max_shard_size: str
) -> None:
    """The first by name, as transformers takes it: a file itself begins with the widest type."""
    folder = save_tiny("llama", tmp_path / "model", max_shard_size=max_shard_size)
    for file in folder.glob("*.safetensors"):
        wide = {k: x.bfloat16() if x.ndim > 1 else x for k, x in load_file(file).items()}
        save_file(wide, file, metadata={"format": "pt"})
    edit_config(folder, dtype=None)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype
    assert resolve_dtype("auto", Checkpoint.open(str(folder))) == expected == torch.bfloat16


def both_refuse(folder: Path, match: str) -> None:
    """The whole model and the skeleton give the same line."""
    checkpoint = Checkpoint.open(str(folder))
    with pytest.raises(InputError, match=match) as resident:
        load_model(checkpoint, torch.float32, CPU)
    with pytest.raises(InputError, match=match) as streamed:
        take_apart(checkpoint, torch.float32)
    assert str(resident.value) == str(streamed.value)


def test_a_tensor_that_no_rule_names_is_not_taken_for_one_that_is_missing(tmp_path: Path) -> None:
    """Were it of the same shape, and the only one left."""
    folder = save_tiny("llama", tmp_path / "model")
    edit_weights(folder, lambda x: x.update(stranger=x.pop("lm_head.weight")))
    both_refuse(folder, r"hold nothing for 1 of the tensors of LlamaForCausalLM, first lm_head")


def test_a_wrapper_s_names_are_told(tmp_path: Path) -> None:
    """Both schedules know that PEFT's prefix is no other model's."""
    folder = save_tiny("llama", tmp_path / "model")
    edit_weights(folder, lambda x: [x.update({f"base_model.model.{k}": x.pop(k)}) for k in [*x]])
    both_refuse(folder, r"named base_model\.model\.…, as PEFT wraps a model")


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    """With both shapes."""
    folder = save_tiny("llama", tmp_path / "model")
    key = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda x: x.update({key: x[key][:48].clone()}))
    both_refuse(folder, r"up_proj\.weight is \(48, 32\), by its config\.json \(56, 32\)")


class _Forgetful(PreTrainedModel):
    """Has two buffers that no checkpoint holds, and fills in one."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.part = nn.Module()
        for name in ("filled", "forgotten"):
            self.part.register_buffer(name, torch.arange(3.0), persistent=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: Any) -> None:
        if hasattr(module, "filled"):
            module.filled.copy_(torch.arange(3.0))


def test_a_buffer_that_nothing_fills_in_is_refused(tmp_path: Path) -> None:
    """`from_pretrained` would leave it with what was in memory."""
    with torch.device("meta"):
        model: Any = _Forgetful(LlamaConfig())
    checkpoint = Checkpoint.open(str(save_tiny("llama", tmp_path / "model")))
    with pytest.raises(InputError, match=r"nothing fills in part\.forgotten"):
        fill_buffers(model, checkpoint, frozenset())
    assert model.part.filled.tolist() == [0, 1, 2]


def test_models_are_loaded_in_threads_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers has no class tie its weights while one loads, and two at once left it so."""
    checkpoint = Checkpoint.open(str(save_tiny("gpt2", tmp_path / "model")))  # it ties its head
    tie_weights = PreTrainedModel.tie_weights
    monkeypatch.setattr(PreTrainedModel, "tie_weights", tie_weights)  # put back in the end
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: load_model(checkpoint, torch.float32, CPU), range(24)))
    assert PreTrainedModel.tie_weights is tie_weights
    assert all(x.lm_head.weight is x.get_input_embeddings().weight for x in models)
