"""A tiny config of every model type that transformers builds as a causal language model.

What: of each type a config of about four blocks and hidden width 32, by the names of the fields
that its class has; what one type needs beside them stands in `_CHANGES`. Why: the matrix runs all
of them, and other tests those in which something is special. Source: the lists of transformers'
auto classes; the shapes are our own.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TEXT: dict[str, Any] = {  # what a language model within another one has too
    "vocab_size": 320,
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
_ROUTED: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
}
_COMMON: dict[str, Any] = {
    **TEXT,
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
    **_ROUTED,
    **dict.fromkeys(("num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    "moe_topk": 2,
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
_SLIDING = ["sliding_attention", "full_attention"] * 2
_LINEAR = ["linear_attention", "full_attention"] * 2
_CONV = ["conv", "full_attention"] * 2
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
_GEMMA_4: dict[str, Any] = {
    "head_dim": 16,
    "global_head_dim": 16,
    "layer_types": _SLIDING,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 320,
    "num_kv_shared_layers": 2,
}
_GEMMA_4_TEXT = {**TEXT, **_GEMMA_4, "sliding_window": 8}
_QWEN: dict[str, Any] = {
    **TEXT,
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": _LINEAR,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 14,
    "spatial_merge_size": 1,
    "num_position_embeddings": 16,
}
_QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": 5,
    "video_token_id": 6,
    "vision_start_token_id": 7,
    "vision_end_token_id": 8,
}
_QWEN_4: dict[str, Any] = {
    "layer_types": _LINEAR,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 32,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
    "ple_embed_dim": 8,
    "ple_layer_ids": [1],
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 8,
    "heads_per_ngram": 2,
    "split_ngram_parts": 2,
}
_LLAMA_4: dict[str, Any] = {
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 56,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8,
}
_ZAMBA: dict[str, Any] = {"num_hidden_layers": 6, "mamba_expand": 2}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ABSENT: Any = object()  # not to be given
_CHANGES: dict[str, dict[str, Any]] = {
    **{x: {"is_decoder": True} for x in ("bert", "roberta", "camembert", "xlm-roberta")},
    "bamba": {**_MAMBA, "mamba_d_state": 8, "attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        **{f"{x}_config": TEXT for x in ("patcher", "encoder", "decoder", "global")},
    },
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "cpmant": {
        "dim_model": 32,
        "dim_head": 8,
        "dim_ff": 56,
        "prompt_types": 4,
        "prompt_length": 4,
        "segment_types": 4,
        "num_hidden_layers": 3,
    },
    "ctrl": {"dff": 56},
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
    "emu3": {"text_config": TEXT},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_expand": 1},
    "fuyu": {
        "text_config": {**TEXT, "model_type": "persimmon"},
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "image_size": 28,
        "patch_size": 14,
    },
    "gemma3": {
        "text_config": {**TEXT, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
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
        "vocab_size_per_layer_input": 320,
        "laurel_rank": 8,
        "num_kv_shared_layers": 2,
        "intermediate_size": [56] * 5,
        "layer_types": [*_SLIDING[:2], "sliding_attention", *_SLIDING[:2]],
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0],
    },
    "gemma4": {
        "text_config": _GEMMA_4_TEXT,
        "vision_config": {
            **{name: size for name, size in _VISION.items() if name != "image_size"},
            "num_key_value_heads": 4,
            "head_dim": 8,
            "global_head_dim": 8,
        },
        "audio_config": None,
        "image_token_id": 5,
    },
    "gemma4_assistant": {"text_config": {**_GEMMA_4_TEXT, "hidden_size_per_layer_input": 0}},
    "gemma4_text": _GEMMA_4,
    "gemma4_unified": {"text_config": _GEMMA_4_TEXT},
    "gemma4_unified_assistant": {
        "text_config": {
            **_GEMMA_4_TEXT,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 4,
        }
    },
    "gemma4_unified_text": _GEMMA_4,
    "git": {"vision_config": _VISION},
    "got_ocr2": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "window_size": 2,
            "mlp_dim": 56,
            "global_attn_indexes": [1],
        },
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {
        **_MAMBA,
        "mamba_d_state": 8,
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
    "kimi_linear": {"layer_types": _LINEAR, "linear_num_heads": 2, "linear_head_dim": 8},
    "lfm2": {"layer_types": _CONV},
    "lfm2_moe": {"layer_types": _CONV, "num_dense_layers": 1},
    "llama4": {
        "text_config": {**TEXT, **_LLAMA_4, "head_dim": 8, "num_local_experts": 4},
        "vision_config": {
            **_VISION,
            **{f"{x}_dim": 32 for x in ("vision_output", "projector_input", "projector_output")},
        },
    },
    "llama4_text": _LLAMA_4,
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 8},
    "minimax": {"layer_types": _LINEAR, "block_size": 8},
    "mllama": {
        "text_config": {**TEXT, "cross_attention_layers": [1, 3]},
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
    "moss_transcribe_diarize": {
        "text_config": {**TEXT, "model_type": "qwen3"},
        "audio_config": {
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 56,
        },
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
    "phi4_multimodal": {
        "vision_config": {**_VISION, "crop_size": 28},
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_blocks": 1,
            "num_attention_heads": 4,
            "input_size": 8,
            "ext_pw_out_channel": 32,
        },
    },
    "qwen3_5": {"text_config": _QWEN, "vision_config": _QWEN_VISION, **_QWEN_TOKENS},
    "qwen3_5_moe": {
        "text_config": {**_QWEN, **_ROUTED},
        "vision_config": _QWEN_VISION,
        **_QWEN_TOKENS,
    },
    "qwen3_next": {"layer_types": _LINEAR, "linear_num_key_heads": 2},
    "qwen4_exp": {
        "text_config": {**_QWEN, **_QWEN_4, **_ROUTED},
        "vision_config": _QWEN_VISION,
    },
    "qwen4_exp_text": _QWEN_4,
    "recurrent_gemma": {
        "lru_width": 32,
        "attention_window_size": 8,
        "block_types": ["recurrent", "attention"],
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 8,
        "feed_forward_size": 56,
    },
    "roc_bert": {"shape_vocab_size": 64, "pronunciation_vocab_size": 64, "is_decoder": True},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "xlstm": {
        "embedding_dim": 32,
        "num_blocks": 3,
        "num_heads": 4,
        "qk_dim_factor": 0.5,
        "v_dim_factor": 1.0,
        "chunk_size": 8,
    },
    "zamba": {
        **_ZAMBA,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
        "head_dim": _ABSENT,
    },
    "zamba2": {
        **_ZAMBA,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "hybrid_layer_ids": [2, 5],
        "num_mem_blocks": 1,
        "adapter_rank": 8,
        "layers_block_type": ["mamba", "mamba", "hybrid"] * 2,
        "head_dim": _ABSENT,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The type's tiny config: the common sizes under the names that it has, and its own.

    `changes` are options of it that the caller wants otherwise.
    """
    kind = CONFIG_MAPPING[model_type]
    aliases = getattr(kind, "attribute_map", None) or {}
    fields = {*inspect.signature(kind.__init__).parameters, *aliases}
    fields |= set(getattr(kind, "__dataclass_fields__", {}))
    own = _CHANGES.get(model_type, {}) | changes
    options = {name: value for name, value in _COMMON.items() if name in fields} | own
    options = {name: value for name, value in options.items() if value is not _ABSENT}
    for alias, name in aliases.items():
        if {alias, name} <= options.keys() and alias != name:
            options.pop(alias if name in own or alias not in own else name)
    if "kv_lora_rank" in options:  # latent attention: every head has keys of its own
        options["num_key_value_heads"] = options["num_attention_heads"]
    if "text_config" in options:
        options = {name: value for name, value in options.items() if name in own}
    return AutoConfig.for_model(model_type, **options)
