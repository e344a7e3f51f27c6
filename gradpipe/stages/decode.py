"""Codes to norms, on the device where scores are computed.

The same arithmetic as `gradpipe.store.codec`, to the bit: what crosses the bus is half a byte a
weight, not four. Shapes: O out, I in.
"""

from __future__ import annotations

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
)
from gradpipe.store.schema import StatisticSpec


def decode_layer(encoded: Mapping[str, Encoded], device: torch.device) -> dict[str, Tensor]:
    """The float32 norms of one layer's statistics, (O, I) or (I,), on `device`."""
    table = torch.from_numpy(level_table()).to(device)
    levels: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    for statistic in sorted(encoded, key=lambda name: encoded[name].spec.base is not None):
        item = encoded[statistic]
        parts = {name: torch.from_numpy(part).to(device) for name, part in item.parts.items()}
        if item.spec.encoding == "log":
            levels_OI = _levels(item.spec, parts["codes"], parts["offsets"].int())
            if item.spec.base is not None:
                base_OI = levels[item.spec.base]
                levels_OI += base_OI.masked_fill(base_OI.abs() >= SPECIAL, 0)
            levels[statistic] = levels_OI
            places = (levels_OI - LOWEST).clamp_(0, len(table) - 1)
            norms[statistic] = table.index_select(0, places.flatten()).view_as(places)
        elif item.spec.encoding == "float16":
            norms[statistic] = parts["values"].float() * item.spec.scale
        else:
            norms[statistic] = parts["values"].sqrt() if statistic in SQUARED else parts["values"]
    return norms


def _levels(spec: StatisticSpec, packed: Tensor, offsets: Tensor) -> Tensor:
    """Offsets + codes, int32 (O, I)."""
    rows, cols, escapes = split_offsets(offsets, len(packed), spec.num_escapes)
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, : len(cols)]
    escaped = codes == ESCAPE
    check_escapes(int(escaped.count_nonzero()), spec)
    levels_OI = codes.int().masked_scatter_(escaped, escapes)
    levels_OI += rows[:, None]
    levels_OI += cols
    return levels_OI
