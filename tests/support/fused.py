"""Tiny models whose checkpoints keep all experts of a block in one tensor, and a naive oracle.

Per sample: autograd of the parameters as transformers has them, and the inputs of each product
that transformers' own code computes with them. Nothing of gradpipe is used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from tests.support.models import VOCAB_SIZE, tiny_tokenizer

NUM_EXPERTS = 4

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

_SAVED_ONE_BY_ONE = ("qwen3_5_moe_text",)  # by transformers; their authors have them in one tensor


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
    model.eval()
    return model


def save_fused(model_type: str, folder: Path) -> Path:
    """Write the model and a tokenizer as a Hugging Face folder, experts in one tensor."""
    model = fused_model(model_type)
    model.save_pretrained(folder)
    if model_type in _SAVED_ONE_BY_ONE:
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)
    return folder


@dataclass(frozen=True, slots=True)
class Expected:
    """By the checkpoint's tensors: sums over samples."""

    grad_l1: dict[str, Tensor]  # of |gradient|, in the tensor's shape
    moments: dict[str, Tensor]  # of x xᵀ over what each of E matrices is multiplied with, (E, I, I)


def expected_sums(folder: Path, input_ids: Tensor) -> Expected:
    """Both sums, one sample at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    model = copy.deepcopy(model.eval())  # no two parameters in the same memory
    products = _Products(model)
    sums = {name: torch.zeros_like(x) for name, x in model.named_parameters()}
    for sample_T in input_ids.long():
        model.zero_grad()
        with products:
            logits_TV = model(input_ids=sample_T[None], use_cache=False).logits[0]
        cross_entropy(logits_TV[:-1], sample_T[1:]).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad.abs()
    keys = {id(x): key for key, x in revert_weight_conversion(model, dict(sums)).items()}
    found = {name: keys.get(id(x), name) for name, x in sums.items()}
    return Expected(
        {found[name]: x for name, x in sums.items()},
        {found[name]: x for name, x in products.moments.items()},
    )


class _Products(TorchFunctionMode):
    """Sums the inputs of every product with a slice of a parameter of several experts."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._stacks = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.ndim == 3 or ".experts.mlp." in name
        }
        self.moments: dict[str, Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        if func in (linear, torch.bmm, Tensor.matmul, torch.matmul, Tensor.__matmul__):
            self._note(*args[:2])
        return func(*args, **(kwargs or {}))

    def _note(self, x: Tensor, matrix: Tensor) -> None:
        for name, stack in self._stacks.items():
            size = stack.numel() // NUM_EXPERTS
            place = (matrix.data_ptr() - stack.data_ptr()) // stack.element_size()
            if 0 <= place < stack.numel():
                width = x.shape[-1]
                sums = self.moments.setdefault(name, torch.zeros(NUM_EXPERTS, width, width))
                for number, rows in enumerate(x.detach() if x.ndim == 3 else x.detach()[None]):
                    sums[place // size + number] += rows.T @ rows
