"""Codes to norms, on the device where scores are computed.

The same arithmetic as `gradpipe.store.codec`, to the bit: what crosses the bus is half a byte a
weight, not four. Shapes: O out, I in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import repeat

import torch
from torch import Tensor

from gradpipe.store.codec import (
    ESCAPE,
    LOWEST,
    SPECIAL,
    UNIT,
    Encoded,
    check_escapes,
    diagonal_roots,
    level_table,
    split_offsets,
    triangle_rows,
)
from gradpipe.store.statistics import STATISTICS

_CHUNK_VALUES = 1 << 20


def decode_norms(encoded: Mapping[str, Encoded], statistic: str, device: torch.device) -> Tensor:
    """The float32 norms of one of a layer's statistics, (O, I), (I,) or (O,), on `device`.

    A second moment as a whole matrix, (I, I) or (O, O).
    """
    item = encoded[statistic]
    if STATISTICS[statistic].is_symmetric:
        return _second_moment(item, device)
    if item.spec.encoding == "log":
        base = None if item.spec.base is None else encoded[item.spec.base]
        return _logarithms(item, base, device)
    values = torch.from_numpy(item.parts["values"]).to(device)
    if item.spec.encoding == "float16":
        return values.float() * item.spec.scale
    return values.sqrt() if STATISTICS[statistic].is_squared else values


def _second_moment(item: Encoded, device: torch.device) -> Tensor:
    """The symmetric matrix of a packed triangle, (N, N)."""
    packed = torch.from_numpy(item.parts["values"]).to(device)
    width = (math.isqrt(8 * len(packed) + 1) - 1) // 2
    matrix_NN = torch.zeros(width, width, device=device)
    for i, row in enumerate(triangle_rows(width)):
        matrix_NN[i, i:] = packed[row]
    if item.spec.encoding == "correlation":
        roots_N = torch.from_numpy(diagonal_roots(item.parts)).to(device)
        matrix_NN *= torch.tensor(1 / UNIT, device=device)
        matrix_NN *= roots_N[:, None]
        matrix_NN *= roots_N
    matrix_NN += matrix_NN.triu(diagonal=1).T  # last, so that both halves are the same numbers
    return matrix_NN


def _logarithms(item: Encoded, base: Encoded | None, device: torch.device) -> Tensor:
    """2^(level / 16), some rows at a time: levels take as much room as norms, and go at once."""
    table = torch.from_numpy(level_table()).to(device)
    num_rows = len(item.parts["codes"])
    num_cols = len(item.parts["offsets"]) - num_rows - item.spec.num_escapes
    norms_OI = torch.empty(num_rows, num_cols, device=device)
    bases = repeat(None) if base is None else _levels(base, device)
    start = 0
    for levels_RI, base_RI in zip(_levels(item, device), bases, strict=base is not None):
        if base_RI is not None:
            levels_RI.add_(base_RI.masked_fill_(base_RI.abs() >= SPECIAL, 0))
        places = levels_RI.sub_(LOWEST).clamp_(0, len(table) - 1).flatten()
        norms_RI = norms_OI[start : start + len(levels_RI)]
        norms_RI.copy_(table.index_select(0, places).view_as(norms_RI))
        start += len(levels_RI)
    return norms_OI


def _levels(item: Encoded, device: torch.device) -> Iterator[Tensor]:
    """Offsets + codes, int32 (R, I), from the first rows to the last."""
    packed = torch.from_numpy(item.parts["codes"]).to(device)
    offsets = torch.from_numpy(item.parts["offsets"]).to(device)
    rows, cols, escapes = split_offsets(offsets, len(packed), item.spec.num_escapes)
    num_rows = max(1, _CHUNK_VALUES // len(cols))
    used = 0
    for some, row_R in zip(packed.split(num_rows), rows.int().split(num_rows), strict=True):
        codes = torch.stack([some & 15, some >> 4], dim=-1).flatten(1)[:, : len(cols)]
        escaped = codes == ESCAPE
        first, used = used, used + int(escaped.count_nonzero())
        if used > len(escapes):
            break
        levels_RI = codes.int().masked_scatter_(escaped, escapes[first:used].int())
        levels_RI += row_R[:, None]
        levels_RI += cols.int()
        yield levels_RI
    check_escapes(used, item.spec)
