"""Mixtures of experts, taken apart: one linear map for each matrix of each expert.

transformers keeps all experts of a block in three-dimensional parameters: `gate_up_proj`
(E, 2I, H), or `up_proj` (E, I, H) where there is no gate, and `down_proj` (E, H, I). Collection
runs on their slices: every expert's matrix is then a layer like any other, named by its tensor in
the checkpoint, that sees the tokens routed to it and no others. The parameters stay what and where
they are, so that weights are loaded as for any other model.

Shapes: T tokens of all samples of a batch, K experts a token, R tokens routed to one expert,
E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gradpipe.stages.model.conversion import Sources

_DOWN = "down_proj"

_FIRST = ("gate_up_proj", "up_proj")  # what reads the token, with and without a gate


class RoutedLinear(nn.Module):
    """A linear map over tokens picked from a batch: which ones is its second argument.

    `routed_R` holds their places among the batch's `num_tokens`, in rising order, so that
    whoever listens can tell the samples apart. Its weight is a part of its owner's.
    """

    def __init__(self, owner: nn.Module, name: str, expert: int, rows: slice, key: str) -> None:
        """Some rows of one expert's matrix in `owner`'s parameter, in the checkpoint at `key`."""
        super().__init__()
        self._owner = (owner,)  # in a tuple PyTorch does not take it for a child
        self.parameter = name  # of the owner's
        self._expert = expert
        self._rows = rows
        self.key = key

    @property
    def weight(self) -> Tensor:
        """(O, I), in the owner's memory."""
        return self._owner[0].get_parameter(self.parameter)[self._expert, self._rows]

    def forward(self, x_RI: Tensor, routed_R: Tensor, num_tokens: int) -> Tensor:
        """(R, O)."""
        del routed_R, num_tokens
        return linear(x_RI, self.weight)


class _Expert(nn.Module):
    """The matrices of one expert: what reads a token, then what reads that."""

    def __init__(self, first: list[RoutedLinear], down: list[RoutedLinear]) -> None:
        super().__init__()
        self.first = nn.ModuleList(first)
        self.down = nn.ModuleList(down)


def split_experts(model: nn.Module, sources: Sources) -> None:
    """Let fused experts run one by one, where the checkpoint holds them one by one.

    Experts that the checkpoint itself keeps fused stay as they are.
    """
    for path, module in list(model.named_modules()):
        if first := _first(module):
            names = [f"{path}.{name}" for name in (first, _DOWN)]
            places = [sources.by_name[name].places() for name in names]
            if all(places):
                _split(module, first, *places)


def is_split(module: nn.Module) -> bool:
    """True for fused experts that run one by one."""
    return isinstance(getattr(module, "each", None), nn.ModuleList)


def fused_weights(model: nn.Module) -> list[str]:
    """The three-dimensional parameters that hold experts, but for those that run one by one."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3
        and "experts" in name
        and not is_split(model.get_submodule(name.rpartition(".")[0]))
    ]


def _first(module: Any) -> str | None:
    """The parameter that reads the tokens, if the module is fused experts without biases."""
    kept = {name for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    first = next((name for name in _FIRST if kept == {name, _DOWN}), None)
    is_plain = hasattr(module, "is_concatenated") and not (
        module.is_transposed or module.has_bias or module.has_post_expert_norm
    )
    return first if is_plain else None


def _split(
    fused: Any, first: str, reading: list[tuple[str, ...]], down: list[tuple[str, ...]]
) -> None:
    """Give fused experts a module for each matrix, and a forward that calls them."""
    fused.each = nn.ModuleList(
        _Expert(_matrices(fused, first, index, x), _matrices(fused, _DOWN, index, y))
        for index, (x, y) in enumerate(zip(reading, down, strict=True))
    )
    fused.forward = MethodType(_forward, fused)


def _matrices(fused: Any, name: str, expert: int, keys: tuple[str, ...]) -> list[RoutedLinear]:
    height = fused.get_parameter(name).shape[1] // len(keys)
    rows = [slice(i * height, (i + 1) * height) for i in range(len(keys))]
    return [RoutedLinear(fused, name, expert, *x) for x in zip(rows, keys, strict=True)]


def _forward(fused: Any, hidden_TH: Tensor, experts_TK: Tensor, shares_TK: Tensor) -> Tensor:
    """Σ over a token's K experts of share x expert(token), (T, H).

    Every expert runs, if on no token at all.
    """
    output_TH = torch.zeros_like(hidden_TH)
    activate = fused._apply_gate if fused.has_gate else fused.act_fn  # noqa: SLF001
    for index, expert in enumerate(fused.each):
        routed_R, slot_R = _routed(experts_TK, index)
        routes = (routed_R, len(hidden_TH))
        x_RH = hidden_TH[routed_R]
        x_RI = activate(_product(expert.first, x_RH, *routes))
        x_RH = _product(expert.down, x_RI, *routes)
        x_RH = x_RH * shares_TK[routed_R, slot_R, None]
        output_TH.index_add_(0, routed_R, x_RH.to(output_TH.dtype))
    return output_TH


def _product(matrices: nn.ModuleList, x_RI: Tensor, *routes: Any) -> Tensor:
    """Of the matrices below each other."""
    products = [matrix(x_RI, *routes) for matrix in matrices]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def _routed(experts_TK: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Tokens whose experts include this one, and at which of the K places.

    All tokens on the meta device, which knows shapes and no values.
    """
    if experts_TK.is_meta:
        every_T = torch.arange(len(experts_TK), device="meta")
        return every_T, torch.zeros_like(every_T)
    token_R, slot_R = (experts_TK == index).nonzero(as_tuple=True)
    return token_R, slot_R
