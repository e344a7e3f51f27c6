"""Tiny models of every type that transformers builds as a causal language model.

What: for a model type its config at toy size, and a complete folder of it with random weights.
Why: the families of `models` are known well and few; users bring all of them. A config takes those
of the common options that it has a field for; what it needs beside is in `_OPTIONS`.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.models import tiny_tokenizer

VOCAB_SIZE = 96

# what a language model inside another one has too
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 56,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_COMMON: dict[str, Any] = {
    **_TEXT,
    # older names of sizes
    **dict.fromkeys(("d_model", "n_embd"), 32),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("n_positions", "n_ctx"), 64),
    **dict.fromkeys(("ffn_dim", "n_inner", "d_ff", "ffn_hidden_size"), 56),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 56),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    "encoder_layers": 2,
    "decoder_layers": 3,
    "head_dim": 8,
    "sliding_window": 8,
    # mixtures of experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts",), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    # attention through latents, with an index
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 32,
    # linear attention and state spaces
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("ssm_state_size", "mamba_d_state", "state_size"), 8),
    # nothing is drawn in a pass
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0),
    **dict.fromkeys(("hidden_dropout", "hidden_dropout_prob"), 0.0),
    **dict.fromkeys(("attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop"), 0.0),
    "attn_pdrop": 0.0,
}

_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}

_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}

_SLIDING = ["sliding_attention", "full_attention"] * 2
_LINEAR = ["linear_attention", "full_attention"] * 2

_GEMMA3 = {**_TEXT, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}

_GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 16,
    "layer_types": _SLIDING,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "num_kv_shared_layers": 2,
}

_QWEN3_5 = {
    **_TEXT,
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": _LINEAR,
}

_QWEN3_5_VISION = {
    "depth": 3,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 14,
    "spatial_merge_size": 1,
    "num_position_embeddings": 16,
}

_QWEN3_5_TOKENS = {
    "image_token_id": 5,
    "video_token_id": 6,
    "vision_start_token_id": 7,
    "vision_end_token_id": 8,
}

_LATENT = ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "youtu")

_ABSENT = object()  # a common option that this type must not get

# model type -> options of its config, beside or in place of the common ones
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    **{x: {"num_key_value_heads": 4} for x in _LATENT},
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "blt": {f"{x}_config": _TEXT for x in ("patcher", "encoder", "decoder", "global")},
    "codegen": {"rotary_dim": 4},
    "cpmant": {
        "dim_model": 32,
        "dim_head": 8,
        "dim_ff": 56,
        "prompt_types": 4,
        "prompt_length": 4,
        "segment_types": 4,
    },
    "ctrl": {"dff": 56, "n_embd": 32},
    "dbrx": {
        "n_layers": 3,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {
            "ffn_hidden_size": 56,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 32,
        },
    },
    "dots1": {"layer_types": ["full_attention"] * 4},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_expand": 1},
    "fuyu": {"text_config": {**_TEXT, "model_type": "persimmon"}, "patch_size": 14},
    "gemma3": {
        "text_config": _GEMMA3,
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 5,
        "boi_token_index": 6,
        "eoi_token_index": 7,
    },
    "gemma3n_text": {
        "head_dim": 16,
        "num_hidden_layers": 5,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "laurel_rank": 8,
        "num_kv_shared_layers": 2,
        "intermediate_size": [56] * 5,
        "layer_types": [*_SLIDING[:2], "sliding_attention", *_SLIDING[:2]],
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0],
    },
    "gemma4": {
        "text_config": {**_TEXT, **_GEMMA4, "sliding_window": 8},
        "vision_config": {
            **_VISION,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "global_head_dim": 8,
        },
        "audio_config": None,
        "image_token_id": 5,
    },
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "granitemoehybrid": {
        **_MAMBA,
        "layer_types": ["mamba", "attention"] * 2,
        "shared_intermediate_size": 24,
    },
    "jamba": {
        "mamba_expand": 2,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "llama4_text": {
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 56,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8,
    },
    "mamba2": {"num_heads": 8, "expand": 2, "n_groups": 1, "chunk_size": 8},
    "minimax": {"layer_types": _LINEAR, "block_size": 8},
    "mllama": {
        "text_config": {**_TEXT, "cross_attention_layers": [1, 3]},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
            "num_global_layers": 1,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        "image_token_index": 5,
    },
    "nemotron_h": {
        "hybrid_override_pattern": "M*ME",
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "olmo_hybrid": {"layer_types": _LINEAR},
    "openai-gpt": {"num_hidden_layers": _ABSENT},
    "qwen3_5": {
        "text_config": _QWEN3_5,
        "vision_config": _QWEN3_5_VISION,
        **_QWEN3_5_TOKENS,
    },
    "qwen3_next": {"layer_types": _LINEAR, "linear_num_key_heads": 2},
    "recurrent_gemma": {
        "lru_width": 32,
        "attention_window_size": 8,
        "block_types": ["recurrent", "attention"],
    },
    "zamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
        "mamba_expand": 2,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
        "head_dim": _ABSENT,
    },
    "zamba2": {
        "mamba_expand": 2,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "num_hidden_layers": 6,
        "hybrid_layer_ids": [2, 5],
        "num_mem_blocks": 1,
        "adapter_rank": 8,
        "layers_block_type": ["mamba", "mamba", "hybrid"] * 2,
        "head_dim": _ABSENT,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The type's config at toy size; `changes` are options of it."""
    kind = CONFIG_MAPPING[model_type]
    names = set(inspect.signature(kind.__init__).parameters) | set(kind.attribute_map)
    names |= {x.name for x in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    own = dict(_OPTIONS.get(model_type, {})) | changes
    common = {} if "text_config" in own else {k: v for k, v in _COMMON.items() if k in names}
    options = common | own
    for alias, name in kind.attribute_map.items():
        if alias != name and alias in options and name in options:
            options.pop(name if alias in own else alias)
    options = {name: value for name, value in options.items() if value is not _ABSENT}
    config: PreTrainedConfig = AutoConfig.for_model(model_type, **options)
    return config


def save_architecture(
    model_type: str, folder: Path, *, kind: str | None = None, seed: int = 0, **changes: Any
) -> Path:
    """Write a tiny random model of the type as a complete folder, and return it.

    `kind` is the name of its class; None: the type's causal language model.
    """
    config = tiny_config(model_type, **changes)
    with torch.random.fork_rng(devices=[]):  # construction draws from the global generator
        torch.manual_seed(seed)
        if kind is None:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        else:
            model = getattr(transformers, kind)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
    model.eval().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
