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


def decode_norms(encoded: Mapping[str, Encoded], statistic: str, device: torch.device) -> Tensor:
    """The float32 norms of one of a layer's statistics, (O, I) or (I,), on `device`."""
    item = encoded[statistic]
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
