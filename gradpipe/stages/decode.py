"""Codes to norms, on the device where scores are computed.

The same arithmetic as `gradpipe.store.codec`, to the bit: what crosses the bus is half a byte a
weight, not four. Shapes: O out, I in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gradpipe.store.codec import (
    ESCAPE,
    LOWEST,
    SPECIAL,
    SQUARED,
    Encoded,
    check_escapes,
    level_table,
    split_offsets,
    triangle_rows,
)
from gradpipe.store.schema import SECOND_MOMENTS


def decode_norms(encoded: Mapping[str, Encoded], statistic: str, device: torch.device) -> Tensor:
    """The float32 norms of one of a layer's statistics, (O, I) or (I,), on `device`.

    A second moment as a whole matrix, (I, I) or (O, O).
    """
    item = encoded[statistic]
    if statistic in SECOND_MOMENTS:
        return _second_moment(item, device)
    if item.spec.encoding == "log":
        levels_OI = _levels(item, device)
        if item.spec.base is not None:
            base_OI = _levels(encoded[item.spec.base], device)
            levels_OI += base_OI.masked_fill_(base_OI.abs() >= SPECIAL, 0)
        table = torch.from_numpy(level_table()).to(device)
        places = levels_OI.sub_(LOWEST).clamp_(0, len(table) - 1)
        return table.index_select(0, places.flatten()).view_as(places)
    values = torch.from_numpy(item.parts["values"]).to(device)
    if item.spec.encoding == "float16":
        return values.float() * item.spec.scale
    return values.sqrt() if statistic in SQUARED else values


def _second_moment(item: Encoded, device: torch.device) -> Tensor:
    """The symmetric matrix of a packed triangle, (N, N)."""
    packed = torch.from_numpy(item.parts["values"]).to(device)
    width = (math.isqrt(8 * len(packed) + 1) - 1) // 2
    matrix_NN = torch.zeros(width, width, device=device)
    for i, row in enumerate(triangle_rows(width)):
        matrix_NN[i, i:] = packed[row]
    if item.spec.encoding == "correlation":
        roots_N = torch.from_numpy(item.parts["diagonal"]).to(device).clamp(min=0).sqrt()
        matrix_NN *= roots_N
        matrix_NN *= roots_N[:, None]
    matrix_NN += matrix_NN.triu(diagonal=1).T  # last, so that both halves are the same numbers
    return matrix_NN


def _levels(item: Encoded, device: torch.device) -> Tensor:
    """Offsets + codes, int32 (O, I)."""
    packed = torch.from_numpy(item.parts["codes"]).to(device)
    offsets = torch.from_numpy(item.parts["offsets"]).to(device).int()
    rows, cols, escapes = split_offsets(offsets, len(packed), item.spec.num_escapes)
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, : len(cols)]
    escaped = codes == ESCAPE
    check_escapes(int(escaped.count_nonzero()), item.spec)
    levels_OI = codes.int().masked_scatter_(escaped, escapes)
    levels_OI += rows[:, None]
    levels_OI += cols
    return levels_OI
