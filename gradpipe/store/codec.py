"""From float32 sums to the arrays that are stored, and back.

A statistic is stored as a group of plain arrays, its *parts*, with a `StatisticSpec` that says
how to read them. Lossy steps happen here, on the values, never as Zarr filters, so that any Zarr
reader sees ordinary numbers. An encoding is one pair of functions and one line in `ENCODINGS`;
`decode` works alike on numpy arrays and on tensors already moved to a device.

    float32   values = the sums themselves
    float16   values = sums / scale, of their square roots for grad_l2 and act_l2, with a power
              of two as scale that puts the largest near 2^14
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradpipe.errors import GradpipeError
from gradpipe.store.schema import LayerSpec, StatisticSpec

Sums = npt.NDArray[np.float32]
Parts = dict[str, npt.NDArray[Any]]

SQUARED = ("grad_l2", "act_l2")  # sums of squares, whose roots are the norms


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One statistic of one layer, as stored."""

    spec: StatisticSpec
    parts: Parts


def encode(encoding: str, statistic: str, sums: Sums, counts: tuple[int, int]) -> Encoded:
    """Encode `sums`, taken over `counts` = (samples, tokens)."""
    parts, extra = ENCODINGS[encoding].encode(statistic, sums)
    spec = StatisticSpec(encoding=encoding, num_samples=counts[0], num_tokens=counts[1], **extra)
    return Encoded(spec=spec, parts=parts)


def decode(
    statistic: str, spec: StatisticSpec, parts: Mapping[str, Any], float32: Callable[[Any], Any]
) -> Any:
    """The float32 sums behind `parts`; `float32` casts one part, on whatever device it is."""
    return ENCODINGS[spec.encoding].decode(statistic, spec, parts, float32)


def part_types(spec: StatisticSpec, layer: LayerSpec, statistic: str) -> dict[str, Any]:
    """Shape and dtype of each part, by name: what a reader must insist on."""
    return ENCODINGS[spec.encoding].parts(layer.statistic_shape(statistic))


def _encode_float32(_: str, sums: Sums) -> tuple[Parts, dict[str, Any]]:
    return {"values": sums}, {}


def _decode_float32(_: str, __: StatisticSpec, parts: Mapping[str, Any], float32: Any) -> Any:
    return float32(parts["values"])


def _encode_float16(statistic: str, sums: Sums) -> tuple[Parts, dict[str, Any]]:
    values = np.sqrt(sums) if statistic in SQUARED else sums
    largest = float(np.abs(values).max())
    if not np.isfinite(largest):
        raise GradpipeError(f"{statistic} is not finite and cannot be encoded")
    scale = 2.0 ** (np.frexp(largest)[1] - 15) if largest > 0 else 1.0
    return {"values": (values / np.float32(scale)).astype(np.float16)}, {"scale": float(scale)}


def _decode_float16(
    statistic: str,
    spec: StatisticSpec,
    parts: Mapping[str, Any],
    float32: Any,
) -> Any:
    values = float32(parts["values"]) * spec.scale
    return values * values if statistic in SQUARED else values


@dataclass(frozen=True, slots=True)
class Encoding:
    """How sums become parts, what the parts look like, and how to read them."""

    encode: Callable[[str, Sums], tuple[Parts, dict[str, Any]]]
    decode: Callable[[str, StatisticSpec, Mapping[str, Any], Any], Any]
    parts: Callable[[tuple[int, ...]], dict[str, Any]]


ENCODINGS = {
    "float32": Encoding(
        _encode_float32, _decode_float32, lambda shape: {"values": (shape, "float32")}
    ),
    "float16": Encoding(
        _encode_float16, _decode_float16, lambda shape: {"values": (shape, "float16")}
    ),
}
