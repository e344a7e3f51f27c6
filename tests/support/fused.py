"""Tiny models whose checkpoints keep all experts of a block in one tensor, and a naive oracle.

Per sample: autograd of the parameters as transformers has them, and the inputs of each product
that transformers' own code computes with them. Nothing of gradpipe is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from tests.support.models import VOCAB_SIZE, tiny_tokenizer

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}

# model_type -> options of its config; widths differ, so that no orientation is taken for another
FUSED: Mapping[str, dict[str, Any]] = {
    "gpt_oss": _SMALL | {"sliding_window": 8},
    "llama4_text": _SMALL
    | {"num_experts_per_tok": 1, "intermediate_size_mlp": 56, "interleave_moe_layer_step": 1},
    "granitemoe": _SMALL,
    "jetmoe": _SMALL | {"kv_channels": 8},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {
            "ffn_hidden_size": 24,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 32,
        },
    },
    "gemma4_text": _SMALL
    | {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "sliding_window": 8,
    },
    "qwen3_5_moe_text": _SMALL
    | {
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
}


def fused_model(model_type: str) -> PreTrainedModel:
    """A model in eval mode, its weights random."""
    tokens = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, **tokens, **FUSED[model_type])
    with torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data = 0.25 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def save_fused(model_type: str, folder: Path) -> Path:
    """Write the model and a tokenizer as a Hugging Face folder."""
    fused_model(model_type).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def gradient_sums(folder: Path, input_ids: Tensor) -> dict[str, Tensor]:
    """Σ over samples of |∂loss/∂W|, by the checkpoint's tensors, each in its shape there."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums: dict[str, Tensor] = {}
    for sample in input_ids.long():
        model.zero_grad()
        logits = model(input_ids=sample[None], use_cache=False).logits[0]
        cross_entropy(logits[:-1], sample[1:]).backward()
        none = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in _named(model)}
        for key, gradient in revert_weight_conversion(model, none).items():
            sums[key] = sums.get(key, torch.zeros_like(gradient)) + gradient.abs()
    return sums


def input_moments(folder: Path, input_ids: Tensor) -> dict[tuple[int, int], Tensor]:
    """Σ x xᵀ over what each expert's matrices were multiplied with, by (place in memory)."""
    ...


def _named(model: Any) -> list[tuple[str, Any]]:
    return list(model.named_parameters())
