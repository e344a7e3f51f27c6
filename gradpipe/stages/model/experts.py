"""Mixtures of experts, taken apart: one linear map for each matrix that the checkpoint holds.

transformers keeps all experts of a block in two three-dimensional parameters, `gate_up_proj`
(E, 2I, H) and `down_proj` (E, H, I); the checkpoints of Mixtral, Qwen-MoE and their kin hold them
one by one (`experts.3.w1.weight` …). Collection runs on the latter: every expert matrix is then a
layer like any other, named by its tensor, that sees the tokens routed to it and no others.

Shapes: T tokens of all samples of a batch, K experts a token, R tokens routed to one expert,
E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gradpipe.stages.checkpoint.folder import Checkpoint

_MATRICES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))  # gate, up, down

_KEY = re.compile(r"(.+)\.experts\.\d+\.(gate_proj|w1)\.weight")


class RoutedLinear(nn.Linear):
    """A linear map over tokens picked from a batch: which ones is its second argument.

    `routed_R` holds their places among the batch's `num_tokens`, in rising order, so that
    whoever listens can tell the samples apart.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        """Share `weight_OI`'s memory."""
        super().__init__(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight_OI, requires_grad=False)

    def forward(  # type: ignore[override]
        self, x_RI: Tensor, routed_R: Tensor, num_tokens: int
    ) -> Tensor:
        """(R, O)."""
        del routed_R, num_tokens
        return linear(x_RI, self.weight)


class _Expert(nn.Module):
    """Gate, up and down projection of one expert, under the checkpoint's names."""

    def __init__(self, names: tuple[str, str, str], gate_up_2IH: Tensor, down_HI: Tensor) -> None:
        super().__init__()
        gate_IH, up_IH = gate_up_2IH.chunk(2)
        self._names = names
        for name, weight in zip(names, (gate_IH, up_IH, down_HI), strict=True):
            self.add_module(name, RoutedLinear(weight))

    def forward(self, x_RH: Tensor, apply_gate: Callable[[Tensor], Tensor], *routes: Any) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in self._names)
        gated_RI = apply_gate(torch.cat([gate(x_RH, *routes), up(x_RH, *routes)], dim=-1))
        output_RH: Tensor = down(gated_RI, *routes)
        return output_RH


class _Experts(nn.ModuleList):
    """Stands in for a model's fused experts; every expert runs, if on no token at all."""

    def __init__(self, fused: Any, names: tuple[str, str, str]) -> None:
        pairs = zip(fused.gate_up_proj, fused.down_proj, strict=True)
        super().__init__(_Expert(names, gate_up, down) for gate_up, down in pairs)
        self._apply_gate = fused._apply_gate  # noqa: SLF001 (each architecture's own activation)

    def forward(self, hidden_TH: Tensor, experts_TK: Tensor, shares_TK: Tensor) -> Tensor:
        """Σ over a token's K experts of share x expert(token), (T, H)."""
        output_TH = torch.zeros_like(hidden_TH)
        for index, expert in enumerate(self):
            routed_R, slot_R = _routed(experts_TK, index)
            x_RH = expert(hidden_TH[routed_R], self._apply_gate, routed_R, len(hidden_TH))
            x_RH = x_RH * shares_TK[routed_R, slot_R, None]
            output_TH.index_add_(0, routed_R, x_RH.to(output_TH.dtype))
        return output_TH


def _routed(experts_TK: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Tokens whose experts include this one, and at which of the K places.

    All tokens on the meta device, which knows shapes and no values.
    """
    if experts_TK.is_meta:
        every_T = torch.arange(len(experts_TK), device="meta")
        return every_T, torch.zeros_like(every_T)
    token_R, slot_R = (experts_TK == index).nonzero(as_tuple=True)
    return token_R, slot_R


def split_experts(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put per-expert linear maps, which share the weights' memory, in place of fused experts.

    Experts that the checkpoint itself keeps fused stay as they are.
    """
    fused = {_numbers(path): path for path, module in model.named_modules() if _is_fused(module)}
    for key in checkpoint.tensors:
        found = _KEY.fullmatch(key)
        path = fused.pop(_numbers(found[1]), None) if found else None
        if found is not None and path is not None:
            names = next(names for names in _MATRICES if found[2] in names)
            owner, _, leaf = path.rpartition(".")
            experts = _Experts(model.get_submodule(path), names)
            setattr(model.get_submodule(owner), leaf, experts)


def fused_weights(model: nn.Module) -> list[str]:
    """The three-dimensional parameters, which hold experts but are no layers."""
    return [name for name, p in model.named_parameters() if p.ndim == 3 and "experts" in name]


def _is_fused(module: Any) -> bool:
    """True for experts of a gate, an up and a down projection, without biases or norms."""
    kept = {name: p.ndim for name, p in module.named_parameters(recurse=False)}
    return (
        kept == {"gate_up_proj": 3, "down_proj": 3}
        and module.is_concatenated
        and not (module.is_transposed or module.has_post_expert_norm)
    )


def _numbers(path: str) -> tuple[str, ...]:
    """What tells blocks apart whatever the names between: `model.layers.3.mlp` -> ("3",)."""
    return tuple(step for step in path.split(".") if step.isdecimal())
