"""Codes to norms, on the device where scores are computed.

The same arithmetic as `gradpipe.store.codec`, to the bit: what crosses the bus is half a byte a
weight, not four. Shapes: O out, I in.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    triangle_width,
)
from gradpipe.store.schema import StatisticSpec
from gradpipe.store.statistics import STATISTICS

_CHUNK_VALUES = 1 << 17  # decoded at a time: they stay in a CPU's cache


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
    width = triangle_width(len(packed))
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
        added = [_Levels.of(self.item, self.device)]
        if self.base is not None:
            added.append(_Levels.of(self.base, self.device, is_base=True))
        rows = torch.stack([x.rows for x in added]).sum(dim=0, dtype=torch.int32) - LOWEST
        cols = torch.stack([x.cols for x in added]).sum(dim=0, dtype=torch.int32)
        for part in (slice(x, x + num_rows) for x in range(0, len(rows), num_rows)):
            codes = [x.codes(part) for x in added]
            summed = codes[0] if len(codes) == 1 else codes[0] + codes[1]  # at most 30
            levels_RI = summed.int().add_(cols).add_(rows[part, None])
            for x, codes_RI in zip(added, codes, strict=True):
                levels_RI.view(-1).index_add_(0, *x.corrections(codes_RI, part))
            places = levels_RI.clamp_(0, len(table) - 1).flatten()
            yield table.index_select(0, places).view_as(levels_RI)
        for x in added:
            check_escapes(x.used, x.spec)


@dataclass(slots=True)
class _Levels:
    """Offsets + codes of one statistic, still apart."""

    packed: Tensor  # (O, I / 2) uint8
    rows: Tensor  # (O,) int32, as the next two
    cols: Tensor  # (I,)
    escapes: Tensor
    spec: StatisticSpec
    least_special: float  # escapes below it are no zeros or infinities of a base
    used: int = 0  # escapes so far

    @classmethod
    def of(cls, item: Encoded, device: torch.device, *, is_base: bool = False) -> Self:
        packed = torch.from_numpy(item.parts["codes"]).to(device)
        offsets = torch.from_numpy(item.parts["offsets"]).to(device).int()
        rows, cols, escapes = split_offsets(offsets, len(packed), item.spec.num_escapes)
        least = SPECIAL - int(rows.abs().max() + cols.abs().max()) if is_base else math.inf
        return cls(packed, rows, cols, escapes, item.spec, least)

    def codes(self, part: slice) -> Tensor:
        """Of these rows, uint8 (R, I): the lower half of a byte comes first."""
        pairs = self.packed[part].to(torch.int16)
        return ((pairs | pairs << 4) & 0x0F0F).view(torch.uint8)[:, : len(self.cols)]

    def corrections(self, codes_RI: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Where the next rows have escapes, flat, and what to add there to offsets + codes.

        A base's zeros and infinities count as level 0. StoreError if there are too few escapes.
        """
        places = _escaped(codes_RI)
        first, self.used = self.used, self.used + len(places)
        if self.used > len(self.escapes):
            check_escapes(self.used, self.spec)
        escapes = self.escapes[first : self.used]
        if len(escapes) and int(escapes.abs().max()) >= self.least_special:
            width = len(self.cols)
            offsets = self.rows[part][places // width] + self.cols[places % width]
            escapes = escapes.where((escapes + offsets).abs() < SPECIAL, -offsets)
        return places, escapes - ESCAPE


def _escaped(codes: Tensor) -> Tensor:
    """Where escapes stand, in row order; NumPy finds them sooner on a CPU."""
    if codes.is_cuda:
        return (codes == ESCAPE).flatten().nonzero().flatten()
    return torch.from_numpy(np.flatnonzero(codes.numpy() == ESCAPE))
