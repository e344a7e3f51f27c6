"""How experts are called: the forwards that replace a fused one's, with each expert on its own.

Each takes the arguments of the forward that it replaces, and gives what that does. `fused` has its
experts in `each`: their matrices `first`, which read a token, and `down`, which read that.

Shapes: T tokens of all samples of a batch, K experts a token, R tokens routed to one expert,
S = T·K, E experts, H hidden, I inputs and O outputs of a matrix.
"""

from typing import Any

import torch
from torch import Tensor, nn


def routed(fused: Any, hidden_TH: Tensor, experts_TK: Tensor, shares_TK: Tensor) -> Tensor:
    """Σ over a token's K experts of share x expert(token), (T, H).

    Every expert runs, if on no token at all.
    """
    shape, hidden_TH = hidden_TH.shape, hidden_TH.flatten(0, -2)
    output_TH = torch.zeros_like(hidden_TH)
    for index, expert in enumerate(fused.each):
        routed_R, slot_R = _routes(experts_TK, index)
        x_RH = _run(fused, expert, hidden_TH[routed_R], routed_R, len(hidden_TH))
        if getattr(fused, "has_post_expert_norm", False):
            x_RH = fused.post_expert_norm(x_RH)
        x_RH = x_RH * shares_TK[routed_R, slot_R, None]
        output_TH.index_add_(0, routed_R, x_RH.to(output_TH.dtype))
    return output_TH.view(shape)


def zeroed(fused: Any, hidden_SH: Tensor) -> Tensor:
    """Each expert of T rows of its own, (E·T, H); rows of zeros are not meant for it."""
    outputs = []
    for expert, x_TH in zip(fused.each, hidden_SH.chunk(len(fused.each)), strict=True):
        routed_R = torch.arange(len(x_TH), device=x_TH.device)
        if not x_TH.is_meta:  # which knows shapes and no values
            routed_R = routed_R[x_TH.any(dim=-1)]
        x_RH = _run(fused, expert, x_TH[routed_R], routed_R, len(x_TH))
        outputs.append(torch.zeros_like(x_TH).index_copy(0, routed_R, x_RH))
    return torch.cat(outputs)


def in_order(fused: Any, x_SI: Tensor, counts: list[int]) -> Tensor:
    """Experts of one matrix, of rows that a router has sorted by expert, (S, O)."""
    token_S, num_tokens = fused.sorted_by[0].routes
    outputs = []
    parts = zip(fused.each, x_SI.split(counts), token_S.split(counts), strict=True)
    for expert, x_RI, token_R in parts:
        order_R = token_R.argsort()
        y_RO = _product(expert.first, x_RI[order_R], token_R[order_R], num_tokens)
        outputs.append(y_RO[order_R.argsort()])
    return torch.cat(outputs)


def note_routes(router: Any, inputs: tuple[Tensor, ...], output: tuple[Any, ...]) -> None:
    """A hook of a router that sorts rows: remember the token of each, its second output."""
    router.routes = (output[1], len(inputs[0]))


def _run(fused: Any, expert: Any, x_RH: Tensor, routed_R: Tensor, num_tokens: int) -> Tensor:
    """One expert on its tokens, (R, H)."""
    x_RI = _activated(fused, _product(expert.first, x_RH, routed_R, num_tokens))
    return _product(expert.down, x_RI, routed_R, num_tokens)


def _activated(fused: Any, x_RI: Tensor) -> Tensor:
    """What experts compute between their matrices; a gate lies before what it lets through."""
    if not getattr(fused, "has_gate", True):
        return fused.act_fn(x_RI)  # type: ignore[no-any-return]
    if hasattr(fused, "_apply_gate"):
        return fused._apply_gate(x_RI)  # type: ignore[no-any-return] # noqa: SLF001
    names = ("act_fn", "activation_fn")
    activate = next(x for name, x in fused.named_modules() if name.endswith(names))
    gate_RI, up_RI = x_RI.chunk(2, dim=-1)
    return activate(gate_RI) * up_RI  # type: ignore[no-any-return]


def _product(matrices: nn.ModuleList, x_RI: Tensor, *routes: Any) -> Tensor:
    """Of the matrices below each other."""
    products = [matrix(x_RI, *routes) for matrix in matrices]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def _routes(experts_TK: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Tokens whose experts include this one, and at which of the K places.

    All tokens on the meta device, which knows shapes and no values.
    """
    if experts_TK.is_meta:
        every_T = torch.arange(len(experts_TK), device="meta")
        return every_T, torch.zeros_like(every_T)
    token_R, slot_R = (experts_TK == index).nonzero(as_tuple=True)
    return token_R, slot_R
