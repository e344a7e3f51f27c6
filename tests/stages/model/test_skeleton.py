"""What is taken for blocks and layers in the models that people bring, and what stays dense."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gradpipe.errors import InputError
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.model.skeleton import Skeleton, take_apart
from tests.support.architectures import save_architecture
from tests.support.models import save_tiny


def skeleton(
    model_type: str,
    tmp_path: Path,
    kind: str | None = None,
    blocks: str | None = None,
    include: tuple[str, ...] = (),
    **changes: Any,
) -> Skeleton:
    """The type's tiny model, taken apart."""
    folder = save_architecture(model_type, tmp_path / "model", kind=kind, **changes)
    return take_apart(Checkpoint.open(str(folder)), torch.float32, blocks, include)


def names(found: Skeleton, block: int = 0) -> set[str]:
    """The layers of one block, by their paths in it."""
    prefix = found.blocks.paths[block] + "."
    return {x.path.removeprefix(prefix) for x in found.layers if x.spec.block == block}


def reasons(found: Skeleton) -> dict[str, str]:
    """Why parameters are no layers."""
    return {x.name: x.reason for x in found.left_out}


def test_blocks_may_be_of_several_classes(tmp_path: Path) -> None:
    """Jamba's blocks of attention and of a state space; not the experts of one of them."""
    found = skeleton("jamba", tmp_path)
    assert found.blocks.path == "model.layers"
    assert found.blocks.count == 4
    assert names(found, 0) >= {"mamba.in_proj", "feed_forward.up_proj"}
    assert names(found, 1) >= {"self_attn.q_proj", "feed_forward.experts.each.3.down.0"}


LARGE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}


def test_blocks_are_those_that_text_runs_through(tmp_path: Path) -> None:
    """A vision tower is none of them, however large."""
    vision = {"num_attention_heads": 4, "image_size": 28, "patch_size": 14, **LARGE}
    found = skeleton("gemma3", tmp_path, vision_config=vision)
    assert found.blocks.path == "model.language_model.layers"
    tower = "model.vision_tower.encoder.layers"
    with pytest.raises(InputError, match=r"does not run through it: give one of model\.lang"):
        take_apart(found.checkpoint, torch.float32, tower)


def test_blocks_that_text_passes_by_are_none(tmp_path: Path) -> None:
    """Llama 3.2 Vision's blocks of cross-attention read images."""
    found = skeleton("mllama", tmp_path, "MllamaForConditionalGeneration")
    assert found.blocks.paths == ("model.layers.0", "model.layers.2")
    assert {x.spec.block for x in found.layers} == {0, 1}
    name = "model.layers.1.cross_attn.q_proj.weight"
    assert reasons(found)[name] == "not called by a pass over a sample"


def test_blocks_are_found_or_named_by_hand(tmp_path: Path) -> None:
    """Any other path must be one that exists."""
    checkpoint = Checkpoint.open(str(save_tiny("llama", tmp_path / "model")))
    assert take_apart(checkpoint, torch.float32, "model.layers").blocks.path == "model.layers"
    with pytest.raises(InputError, match=r"this model has model\.layers"):
        take_apart(checkpoint, torch.float32, "model.blocks")


ROUTERS = {  # the router, and a layer beside it
    "gemma4_text": ("router.proj", "mlp.gate_proj"),
    "hunyuan_v1_moe": ("mlp.gate.wg", "mlp.shared_mlp.up_proj"),
    "jetmoe": ("mlp.router.layer", "self_attention.kv_proj"),
    "qwen2_moe": ("mlp.shared_expert_gate", "mlp.shared_expert.up_proj"),
    "dbrx": ("ffn.router.layer", "norm_attn_norm.attn.Wqkv"),
}


@pytest.mark.parametrize("model_type", ROUTERS)
def test_routers_stay_dense(model_type: str, tmp_path: Path) -> None:
    """Also where a router is an nn.Linear within another module; gates of an MLP are layers."""
    changes: dict[str, Any] = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
    changes |= {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    gemma: dict[str, Any] = changes | {"moe_intermediate_size": 24}
    found = skeleton(model_type, tmp_path, **(gemma if model_type == "gemma4_text" else {}))
    router, layer = ROUTERS[model_type]
    assert router not in names(found)
    assert layer in names(found)
    path = f"{found.blocks.paths[0]}.{router}.weight"
    assert reasons(found)[path] == "a router or gate of experts"


def test_a_linear_s_subclass_that_computes_something_else_is_no_layer(tmp_path: Path) -> None:
    """Phi-3.5-MoE's router returns a tuple."""
    found = skeleton("phimoe", tmp_path)
    assert "mlp.router" not in names(found)
    assert "something else" in reasons(found)["model.layers.0.mlp.router.weight"]


def test_maps_without_a_whole_gradient_stay_dense(tmp_path: Path) -> None:
    """Shared between blocks; called twice in a pass; used without being called."""
    zamba = reasons(skeleton("zamba2", tmp_path / "zamba"))
    shared = "model.layers.2.shared_transformer.self_attn.q_proj.weight"
    assert zamba[shared] == "its tensor is used by several modules"
    gemma = reasons(skeleton("gemma3n_text", tmp_path / "gemma"))
    twice = "model.layers.0.altup.modality_router.weight"
    assert gemma[twice] == "called 2 times by a pass over a sample"
    jamba = reasons(skeleton("jamba", tmp_path / "jamba"))
    assert jamba["model.layers.0.mamba.dt_proj.weight"] == "not called by a pass over a sample"


def test_maps_that_no_gradient_comes_to_stay_dense(tmp_path: Path) -> None:
    """What chooses the tokens to attend to is compared, and no more."""
    found = reasons(skeleton("deepseek_v32", tmp_path))
    assert found["model.layers.0.self_attn.indexer.wk.weight"].startswith("no gradient comes")


def test_what_is_left_out_and_what_is_a_layer_are_all(tmp_path: Path) -> None:
    """Every matrix of the blocks is one or the other."""
    found = skeleton("jamba", tmp_path)
    blocks = found.model.get_submodule(found.blocks.path)
    weights = sum(p.numel() for p in blocks.parameters() if p.ndim >= 2)
    layers = sum(x.spec.num_weights for x in found.layers)
    assert layers + sum(x.num_weights for x in found.left_out) == weights


def test_layers_are_left_out_as_asked(tmp_path: Path) -> None:
    """By a regex on their names, that must match; and it is told."""
    checkpoint = Checkpoint.open(str(save_tiny("llama", tmp_path / "model")))
    found = take_apart(checkpoint, torch.float32, exclude=("down_proj$",))
    assert "mlp.down_proj" not in names(found)
    reason = reasons(found)["model.layers.0.mlp.down_proj.weight"]
    assert reason == "left out by --exclude down_proj$"
    told = r"--exclude w2: matches no linear layer that is collected; .* and 10 more"
    with pytest.raises(InputError, match=told):
        take_apart(checkpoint, torch.float32, exclude=("w2",))


def test_what_a_sample_does_not_run_through_cannot_be_included(tmp_path: Path) -> None:
    """Such as a vision tower's layers, of a model that is given text."""
    with pytest.raises(InputError, match=r"vision_tower.*is no layer: not called by a pass"):
        skeleton("gemma3", tmp_path, include=("vision_tower",))
