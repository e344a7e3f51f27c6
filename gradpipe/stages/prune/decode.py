"""Codes to norms, on the device where scores are computed.

The same arithmetic as `gradpipe.store.codec`, to the bit: what crosses the bus is half a byte a
weight, not four. Shapes: O out, I in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Self

import numpy as np
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

_CHUNK_VALUES = 1 << 19  # decoded at a time: they stay in a CPU's cache


def decode_norms(encoded: Mapping[str, Encoded], statistic: str, device: torch.device) -> Tensor:
    """The float32 norms of one of a layer's statistics, (O, I), (I,) or (O,), on `device`.

    A second moment as a whole matrix, (I, I) or (O, O).
    """
    item = encoded[statistic]
    if STATISTICS[statistic].is_symmetric:
        return _second_moment(item, device)
    if item.spec.encoding == "log":
        return Logarithms.of(encoded, statistic, device).whole()
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


@dataclass(frozen=True, slots=True)
class Logarithms:
    """Norms 2^(level / 16), (O, I), still as codes: decoded, they take eight times the room."""

    item: Encoded
    base: Encoded | None  # whose levels are added
    device: torch.device

    @classmethod
    def of(cls, encoded: Mapping[str, Encoded], statistic: str, device: torch.device) -> Self:
        """One of a layer's statistics."""
        base = encoded[statistic].spec.base
        return cls(encoded[statistic], None if base is None else encoded[base], device)

    def whole(self) -> Tensor:
        """All norms, float32 (O, I)."""
        num_cols = 2 * self.item.parts["codes"].shape[1]  # or one less
        return torch.cat(list(self.parts(max(1, _CHUNK_VALUES // num_cols))))

    def parts(self, num_rows: int) -> Iterator[Tensor]:
        """The norms of so many rows, float32 (R, I), and of the next; StoreError if damaged."""
        table = torch.from_numpy(level_table()).to(self.device)
        bases = repeat(None) if self.base is None else _levels(self.base, num_rows, self.device)
        levels = _levels(self.item, num_rows, self.device, above=LOWEST)
        for levels_RI, base_RI in zip(levels, bases, strict=self.base is not None):
            if base_RI is not None:
                levels_RI.add_(_finite(base_RI))
            places = levels_RI.clamp_(0, len(table) - 1).flatten()
            yield table.index_select(0, places).view_as(levels_RI)


def _levels(item: Encoded, num_rows: int, device: torch.device, above: int = 0) -> Iterator[Tensor]:
    """Offsets + codes, `above` some level, int32 (R, I), from the first rows to the last."""
    packed = torch.from_numpy(item.parts["codes"]).to(device)
    offsets = torch.from_numpy(item.parts["offsets"]).to(device).int()
    rows, cols, escapes = split_offsets(offsets, len(packed), item.spec.num_escapes)
    rows, escapes = rows - above, escapes - ESCAPE  # these are added to the code itself
    used = 0
    for some, row_R in zip(packed.split(num_rows), rows.split(num_rows), strict=True):
        codes = _codes(some, len(cols))
        levels_RI = (codes + cols).add_(row_R[:, None])
        places = _escaped(codes)
        first, used = used, used + len(places)
        if used > len(escapes):
            break
        levels_RI.view(-1).index_add_(0, places, escapes[first:used])
        yield levels_RI
    check_escapes(used, item.spec)


def _codes(packed: Tensor, num_cols: int) -> Tensor:
    """Half bytes apart, uint8 (R, I): the lower half of a byte comes first."""
    pairs = packed.to(torch.int16)
    return ((pairs | pairs << 4) & 0x0F0F).view(torch.uint8)[:, :num_cols]


def _escaped(codes: Tensor) -> Tensor:
    """Where escapes stand, in row order; NumPy finds them sooner on a CPU."""
    if codes.is_cuda:
        return (codes == ESCAPE).flatten().nonzero().flatten()
    return torch.from_numpy(np.flatnonzero(codes.numpy() == ESCAPE))


def _finite(levels: Tensor) -> Tensor:
    """Levels to code against, in place: 0 where the value is zero or infinite."""
    if max(abs(int(x)) for x in levels.aminmax()) >= SPECIAL:
        levels.masked_fill_(levels.abs() >= SPECIAL, 0)
    return levels
