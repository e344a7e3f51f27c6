"""Tiny random causal language models, one per supported family.

What: a config table from which each family is built in milliseconds, with weights large enough
that no gradient, score or norm is degenerate, and a writer of complete Hugging Face folders.
Why: tests run on real `transformers` modelling code instead of mocks, and offline.
Source: the architectures are those of `transformers`, the shapes our own.

Every model has 2 blocks, hidden width 32, vocabulary 96 and at least 64 positions; all input widths
are divisible by 8 and no family has all its output widths divisible by 128.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 96
SLIDING_WINDOW = 8  # shorter than any sequence a test should use

_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# hidden, blocks, heads (widths 32 = 4 heads of 8) under the names that most families share
_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 56}

# family -> (model_type in `transformers`, options of its config)
_CONFIGS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": SLIDING_WINDOW}),
    "qwen2": ("qwen2", _GROUPED),
    # head_dim 16: the attention is wider (64) than the hidden state (32)
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 16}),
    "gemma3": (
        "gemma3_text",
        {
            **_GROUPED,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    # fused q/k/v and fused gate/up projections
    "phi3": ("phi3", {**_GROUPED, "original_max_position_embeddings": 64}),
    "opt": ("opt", {**_COMMON, "ffn_dim": 56, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gpt2": (
        "gpt2",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 56,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "gpt_neox": ("gpt_neox", {**_COMMON, "intermediate_size": 56}),
    # the Falcon-40B architecture: grouped queries, attention and MLP in parallel
    "falcon": (
        "falcon",
        {**_COMMON, "num_kv_heads": 2, "ffn_hidden_size": 56, "new_decoder_architecture": True},
    ),
    # mixtures of experts: 3-D parameters in the model, one tensor an expert in the checkpoint
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **_GROUPED,
            "head_dim": 16,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
}

FAMILIES: tuple[str, ...] = tuple(_CONFIGS)

_PAD, _BOS, _EOS, _UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
_TOKENIZER_TEXT = (
    "The quick brown fox jumps over the lazy dog.",
    "Sums add; roots and codes do not, so the root is taken once, at the end.\n\n",
    "A layer is one weight matrix (out, in), and a sample is one sequence of tokens.",
    "In 2024 we pruned 50% of the weights: was it 1, 3, 5, 6, 7, 8 or 9 in ten?",
)


def tiny_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build the family's tiny float32 model in eval mode; the same seed gives the same weights.

    `changes` are options of its config.
    """
    model_type, options = _CONFIGS[family]
    options = {**_SPECIAL_TOKENS, **options, **changes}
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB_SIZE, **options)
    with torch.random.fork_rng(devices=[]):  # construction draws from the global generator
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, torch.Generator().manual_seed(seed))
    model.eval()
    return model


def save_tiny(
    family: str,
    folder: Path,
    seed: int = 0,
    *,
    max_shard_size: int | str = "5GB",
    **changes: Any,
) -> Path:
    """Write the tiny model and a tokenizer as a complete Hugging Face folder, and return it.

    A small `max_shard_size`, such as "20KB", gives several safetensors shards and their index.
    """
    tiny_model(family, seed, **changes).save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `VOCAB_SIZE` tokens; bytes it never saw become <unk>."""
    tokenizer = Tokenizer(models.BPE(unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = [_PAD, _BOS, _EOS, _UNKNOWN]  # ids 0, 1, 2 as in the configs
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=special_tokens, show_progress=False
    )
    tokenizer.train_from_iterator(_TOKENIZER_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        unk_token=_UNKNOWN,
    )


def random_ids(vocab: int, num_samples: int, seq_len: int, seed: int) -> Tensor:
    """Draw int64 token ids (num_samples, seq_len), uniform over the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (num_samples, seq_len), generator=generator)


@torch.no_grad()
def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Redraw matrices with std 1.5/sqrt(32), far above the usual 0.02; shift scales and biases."""
    for parameter in model.parameters():  # tied weights come once
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(noise * 1.5 / 32**0.5)
        else:
            parameter.add_(noise * 0.2)
