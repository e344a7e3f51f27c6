"""From float32 sums to the arrays that are stored, and back to norms.

A statistic is stored as a group of plain arrays, its *parts*, and a `StatisticSpec` that says how
to read them. Lossy steps happen here, on the values, never as Zarr filters, so that any Zarr
reader sees ordinary numbers. What comes back is a norm: the root of the sum where the sum is of
squares, the sum itself elsewhere. Which encodings a statistic may be in stands in its entry of
`STATISTICS`.

    float32   values = the sums, exact
    float16   values = norms / scale, with a power of two as scale that puts the largest near 2¹⁴
    compact   gradient norms as 4-bit logarithms (`log`, below); activations as float32, signed sums
              as float16; second moments as 16-bit correlations beside a float32 diagonal

A compact norm is 2^(level/16), at most 2.2 % off. A gradient's magnitude is close to a product
of one factor per row and one per column, so level = rows[i] + cols[j] + code, and the codes are
small: 0..14 fit half a byte, 15 says that the next escape stands here instead. `offsets` holds
rows, cols and escapes. Where a statistic's base is kept too (`grad_l2` is that of `grad_l1`), it is
coded against that, whose levels are added.
`docs/store-format.md` decodes it in ten lines; `gradpipe.stages.prune.decode` does so on a device.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from gradpipe.errors import StoreError
from gradpipe.store.schema import LayerSpec, StatisticSpec
from gradpipe.store.statistics import STATISTICS, Statistic, Sums

Levels = npt.NDArray[np.int32]
Levels16 = npt.NDArray[np.int16]
Parts = dict[str, npt.NDArray[Any]]
STEPS = 16  # levels of a factor of two
ESCAPE = 15
UNIT = 32767  # a correlation of 1
SPECIAL = 1 << 14  # levels below −this stand for 0, above it for ∞
_CHUNK_VALUES = 1 << 20
_LARGEST = float(np.finfo(np.float32).max)
_LEAST_EXPONENT = -126  # of a scale: float32's smallest normal number
LOWEST, HIGHEST = -126 * STEPS - 1, 128 * STEPS  # one beyond float32's normal numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One statistic of one layer, as stored."""

    spec: StatisticSpec
    parts: Parts


def encode_layer(
    encoding: str, sums: Mapping[str, Sums], num_samples: int, num_tokens: int
) -> dict[str, Encoded]:
    """Encode every statistic of one layer, in the order in which a reader needs them."""
    encoded: dict[str, Encoded] = {}
    levels: dict[str, Levels16] = {}
    bases = {STATISTICS[name].base for name in sums}
    for name in sorted(sums, key=lambda name: name not in bases):
        statistic, values = STATISTICS[name], sums[name]
        kind = statistic.encoding(encoding)
        base = statistic.base if kind == "log" and statistic.base in sums else None
        fields: dict[str, Any] = {}
        if kind == "log":
            below = levels.pop(base) if base else None
            parts, fields["num_escapes"], levels[name] = _encode_log(statistic, values, below)
        elif kind == "correlation":
            parts = _encode_correlation(values)
        elif kind == "float16":
            parts, fields["scale"] = _encode_float16(statistic.norm_of(values))
        else:
            parts = {"values": values}
        spec = StatisticSpec(
            encoding=kind, num_samples=num_samples, num_tokens=num_tokens, base=base, **fields
        )
        encoded[name] = Encoded(spec=spec, parts=parts)
    return encoded


def decode_layer(encoded: Mapping[str, Encoded]) -> dict[str, Sums]:
    """The float32 norms of one layer's statistics, bases among them; second moments packed."""
    norms = {}
    for statistic, item in encoded.items():
        if item.spec.encoding == "log":
            base = None if item.spec.base is None else encoded[item.spec.base]
            norms[statistic] = _decode_log(item, base)
        elif item.spec.encoding == "correlation":
            norms[statistic] = _decode_correlation(item.parts)
        elif item.spec.encoding == "float16":
            norms[statistic] = item.parts["values"].astype(np.float32) * np.float32(item.spec.scale)
        else:
            norms[statistic] = STATISTICS[statistic].norm_of(item.parts["values"])
    return norms


def is_sound(statistic: str, item: Encoded) -> bool:
    """True if a statistic's values are finite, as only logarithms need not be.

    Raises StoreError if codes do not go with their escapes.
    """
    if item.spec.encoding == "log":
        for _ in _level_rows(item):  # looked at some at a time: norms take eight times their room
            pass
        return True
    is_scaled = item.spec.encoding == "float16"
    if is_scaled and float(np.abs(item.parts["values"]).max()) * item.spec.scale > _LARGEST:
        return False
    squares_are_sound = is_scaled or not STATISTICS[statistic].is_squared
    return all(
        bool(np.isfinite(part).all()) and (squares_are_sound or float(part.min()) >= 0)
        for part in item.parts.values()
    )


def part_types(
    spec: StatisticSpec, layer: LayerSpec, statistic: str
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each part, by name: what a reader must insist on.

    Raises StoreError for an encoding, a base, a scale or escapes that the format does not allow.
    """
    _check_spec(spec, statistic)
    shape = layer.statistic_shape(statistic)
    if spec.encoding == "correlation":
        width = STATISTICS[statistic].sum_shape(layer.shape)[:1]
        return {"diagonal": (width, "float32"), "values": (shape, "int16")}
    if spec.encoding != "log":
        return {"values": (shape, spec.encoding)}
    rows, columns = shape
    if spec.num_escapes > rows * columns:
        raise StoreError(f"{spec.num_escapes} escapes in {rows} x {columns} codes")
    return {
        "codes": ((rows, (columns + 1) // 2), "uint8"),
        "offsets": ((rows + columns + spec.num_escapes,), "int16"),
    }


def _check_spec(spec: StatisticSpec, name: str) -> None:
    statistic = STATISTICS[name]
    if spec.encoding not in statistic.encodings:
        raise StoreError(
            f"{name}: unknown encoding {spec.encoding[:40]!r}, expected one of "
            f"{statistic.encodings}"
        )
    has_scale = spec.encoding == "float16" and math.frexp(spec.scale)[0] == 0.5  # a power of two
    if (spec.scale != 1.0 and not has_scale) or (spec.num_escapes and spec.encoding != "log"):
        raise StoreError(
            f"{name}: a scale of {spec.scale} and {spec.num_escapes} escapes do not go with "
            f"encoding {spec.encoding}"
        )
    bases = (None, statistic.base) if spec.encoding == "log" else (None,)
    if spec.base not in bases:
        raise StoreError(f"{name}: cannot be coded against {str(spec.base)[:40]!r}")


def check_bases(encoded: Mapping[str, Encoded]) -> None:
    """Refuse a base that has no levels to add."""
    for statistic, item in encoded.items():
        if item.spec.base is not None and encoded[item.spec.base].spec.encoding != "log":
            raise StoreError(f"{statistic}: its base {item.spec.base} is not in encoding log")


def triangle_width(length: int) -> int:
    """N of a packed upper triangle of N (N + 1) / 2 entries."""
    return (math.isqrt(8 * length + 1) - 1) // 2


def triangle_rows(width: int) -> list[slice]:
    """Where each row of a packed upper triangle lies: row i holds columns i to `width`."""
    starts = [i * width - i * (i - 1) // 2 for i in range(width + 1)]
    return [slice(a, b) for a, b in pairwise(starts)]


def square(packed: Sums) -> Sums:
    """The symmetric matrix (N, N) of a packed upper triangle."""
    width = triangle_width(len(packed))
    matrix_NN = np.zeros((width, width), dtype=packed.dtype)
    for i, row in enumerate(triangle_rows(width)):
        matrix_NN[i, i:] = matrix_NN[i:, i] = packed[row]
    return matrix_NN


def _encode_correlation(packed: Sums) -> Parts:
    """M_ij / √(M_ii·M_jj) in steps of 1/32767, and the diagonal; 0 where a diagonal entry is 0.

    Even steps, as the errors of all entries add up: float16's, large near ±1 where inputs share a
    mean, would make matrices indefinite that are not.
    """
    rows = triangle_rows(triangle_width(len(packed)))
    diagonal = packed[[row.start for row in rows]]
    inverse = np.zeros_like(diagonal)
    np.divide(1, np.sqrt(diagonal), out=inverse, where=diagonal > 0)
    values = np.empty(len(packed), dtype=np.int16)
    for i, row in enumerate(rows):
        exact = packed[row] * inverse[i] * inverse[i:]
        values[row] = np.rint(np.clip(exact, -1, 1) * UNIT)
    return {"diagonal": diagonal, "values": values}


def _decode_correlation(parts: Parts) -> Sums:
    """The packed sums."""
    roots = diagonal_roots(parts)
    packed = parts["values"] * np.float32(1 / UNIT)
    for i, row in enumerate(triangle_rows(len(roots))):
        packed[row] *= roots[i]
        packed[row] *= roots[i:]
    return packed


def diagonal_roots(parts: Parts) -> Sums:
    """The roots of a second moment's diagonal, as numpy rounds them."""
    roots: Sums = np.sqrt(np.maximum(parts["diagonal"], 0))
    return roots


def _decode_log(item: Encoded, base: Encoded | None) -> Sums:
    """2^(level / 16) of offsets + codes, and of the base's levels, (out, in)."""
    table, parts = level_table(), []
    bases = repeat(None) if base is None else _level_rows(base)
    for levels_RI, base_RI in zip(_level_rows(item), bases, strict=base is not None):
        places = levels_RI - LOWEST
        if base_RI is not None:
            places += _finite(base_RI)
        parts.append(table.take(places, mode="clip"))
    return np.concatenate(parts)


def _level_rows(item: Encoded) -> Iterator[Levels]:
    """Offsets + codes, some rows at a time; specials far outside ±`SPECIAL`."""
    packed, offsets = item.parts["codes"], item.parts["offsets"].astype(np.int32)
    rows, cols, escapes = split_offsets(offsets, len(packed), item.spec.num_escapes)
    used = 0
    for part in _row_chunks((len(packed), len(cols))):
        codes = np.stack([packed[part] & 15, packed[part] >> 4], axis=-1)
        levels = codes.reshape(len(codes), -1)[:, : len(cols)].astype(np.int32)
        escaped = levels == ESCAPE
        first, used = used, used + int(np.count_nonzero(escaped))
        if used > len(escapes):
            break
        levels[escaped] = escapes[first:used]
        levels += rows[part, None] + cols
        yield levels
    check_escapes(used, item.spec)


def split_offsets(offsets: Any, num_rows: int, num_escapes: int) -> tuple[Any, Any, Any]:
    """Rows (out,), columns (in,) and escapes of an `offsets` part, numpy or torch."""
    end = len(offsets) - num_escapes
    return offsets[:num_rows], offsets[num_rows:end], offsets[end:]


def check_escapes(found: int, spec: StatisticSpec) -> None:
    """Refuse codes that do not go with their escapes."""
    if found != spec.num_escapes:
        raise StoreError(f"codes hold {found} escapes, expected {spec.num_escapes}")


def level_table() -> Sums:
    """The norm of each level from `LOWEST` to `HIGHEST`: 0, 2^(level/16) …, ∞."""
    norms = np.exp2(np.arange(LOWEST, HIGHEST) / STEPS).astype(np.float32)
    norms[0] = 0
    return np.append(norms, np.float32(np.inf))


def _finite(levels: Levels) -> Levels:
    """Levels to code against: 0 where the value is zero or infinite."""
    return np.where(np.abs(levels) < SPECIAL, levels, 0)


def _encode_log(
    statistic: Statistic, sums: Sums, base: Levels16 | None
) -> tuple[Parts, int, Levels16]:
    """A compact statistic's parts, number of escapes, and levels for another to be coded against.

    Layers are large: all but the levels, two bytes each, is done for a few rows at a time.
    """
    levels, special = _levels(statistic, sums)
    if base is not None:
        levels -= base
    finite = special == 0
    rows, cols = _fit(levels, finite)
    first = _best_window(levels, rows, cols, finite)
    codes = np.zeros((len(sums), (sums.shape[1] + 1) // 2), dtype=np.uint8)
    escapes = []
    for part in _row_chunks(sums.shape):
        residual = levels[part] - (rows[part, None] + first) - cols
        residual[special[part] < 0], residual[special[part] > 0] = -2 * SPECIAL, 2 * SPECIAL - 1
        escaped = (residual < 0) | (residual >= ESCAPE)
        escapes.append(residual[escaped])
        residual[escaped] = ESCAPE
        codes[part] = residual[:, 0::2]
        codes[part, : residual.shape[1] // 2] |= residual[:, 1::2].astype(np.uint8) << 4
    offsets = np.concatenate([rows + first, cols, *escapes]).astype(np.int16)
    if base is not None:
        levels += base
    levels[~finite] = 0
    parts = {"codes": codes, "offsets": offsets}
    return parts, len(offsets) - len(rows) - len(cols), levels


def _row_chunks(shape: tuple[int, ...]) -> list[slice]:
    step = max(1, _CHUNK_VALUES // shape[1])
    return [slice(start, start + step) for start in range(0, shape[0], step)]


def _levels(statistic: Statistic, sums: Sums) -> tuple[Levels16, npt.NDArray[np.int8]]:
    """16 · log₂ of the norms, rounded; and −1 where one is zero, 1 where it is ∞, else 0."""
    levels = np.zeros(sums.shape, dtype=np.int16)
    special = np.zeros(sums.shape, dtype=np.int8)
    for part in _row_chunks(sums.shape):
        norms = statistic.norm_of(sums[part])
        zero, infinite = norms < np.finfo(np.float32).tiny, np.isinf(norms)  # subnormals are zero
        special[part] = infinite.astype(np.int8) - zero.astype(np.int8)
        exact = np.log2(norms, where=~(zero | infinite), out=np.zeros_like(norms))
        exact *= STEPS
        levels[part] = np.rint(exact, out=exact)
    return levels, special


def _fit(levels: Levels16, finite: npt.NDArray[np.bool_]) -> tuple[Levels, Levels]:
    """One whole offset per row and one per column: means over the finite levels."""
    counts = np.count_nonzero(finite, axis=1)
    sums = np.sum(levels, axis=1, where=finite, dtype=np.int64)
    rows = np.rint(sums / np.maximum(counts, 1)).astype(np.int32)
    rest = np.zeros(levels.shape[1], dtype=np.int64)
    for part in _row_chunks(levels.shape):
        rest += np.sum(levels[part] - rows[part, None], axis=0, where=finite[part], dtype=np.int64)
    columns = np.maximum(np.count_nonzero(finite, axis=0), 1)
    return rows, np.rint(rest / columns).astype(np.int32)


def _best_window(
    levels: Levels16, rows: Levels, cols: Levels, finite: npt.NDArray[np.bool_]
) -> int:
    """The first of the 15 consecutive levels that hold most of what rows and columns leave."""
    counts = np.zeros(1, dtype=np.int64)
    for part in _row_chunks(levels.shape):
        residual = (levels[part] - rows[part, None] - cols)[finite[part]]
        more = np.bincount(residual + SPECIAL, minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    if not counts.any():
        return 0
    inside = np.convolve(counts, np.ones(ESCAPE, dtype=np.int64))
    return int(inside.argmax()) - SPECIAL - (ESCAPE - 1)


def _encode_float16(norms: Sums) -> tuple[Parts, float]:
    """Norms divided by a power of two, and that power."""
    largest = float(np.abs(norms).max(where=np.isfinite(norms), initial=0.0))
    exponent = max(int(np.frexp(largest)[1]) - 15, _LEAST_EXPONENT)
    scale = 2.0**exponent if largest > 0 else 1.0
    return {"values": (norms / np.float32(scale)).astype(np.float16)}, scale
