"""A sweep's points as lines: for each way to prune, the measure against what was varied."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Self

from gradpipe.errors import InputError
from gradpipe.pipeline.reports.points import RESULTS, PointResult, called, read_points, told_apart

_MEASURES = {"perplexity": "perplexity", "top1": "top-1 accuracy"}
_ENOUGH = 3  # values that make an axis


@dataclass(frozen=True, slots=True)
class Series:
    """One line, or the dots of one target."""

    name: str
    points: tuple[float, ...]  # ascending; of dots, which row each is in
    values: tuple[float, ...]
    is_pattern: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What a sweep's folder holds of one model on one measure."""

    title: str
    results: tuple[PointResult, ...]
    axis: str  # what was varied: sparsity; α or samples, where one target was pruned; or neither
    rows: tuple[str, ...]  # if neither: the ways to prune, and a series for each target
    measure: str
    series: tuple[Series, ...]
    dense: float | None

    @classmethod
    def read(cls, folder: Path, title: str) -> tuple[Self, ...]:
        """The points in a folder, those that compare with each other in one sweep.

        InputError if one line is none, or all are torn.
        """
        found = read_points(folder / RESULTS, "mend or remove that line")
        if not found:
            raise InputError(f"{folder / RESULTS} holds no point: let pipe sweep go on")
        alike: dict[str, list[PointResult]] = {}
        for result in found:
            alike.setdefault(_measured(result), []).append(result)
        numbers = (f" ({n} of {len(alike)})" if len(alike) > 1 else "" for n in count(1))
        return tuple(cls.of(title + n, x) for n, x in zip(numbers, alike.values(), strict=False))

    @classmethod
    def of(cls, title: str, results: Sequence[PointResult]) -> Self:
        """Lines of points, or dots."""
        pruned = [result for result in results if result.point is not None]
        dense = [x.metric.value for x in results if x.point is None and x.metric.value is not None]
        axis = _axis_of(pruned)
        names = names_of(pruned, axis)
        rows = () if axis else tuple(dict.fromkeys(names.values()))
        return cls(
            title=title,
            results=tuple(results),
            axis=axis,
            rows=rows,
            measure=_MEASURES.get(results[0].metric.name, results[0].metric.name),
            series=tuple(_lines(pruned, axis, names) if axis else _dots(pruned, rows, names)),
            dense=dense[0] if dense else None,
        )

    @property
    def is_better_higher(self) -> bool:
        """True for an accuracy."""
        return self.results[0].metric.name == "top1"


def _axis_of(results: Sequence[PointResult]) -> str:
    """What the points differ in, so that lines can be drawn over it."""
    shares = {share_of(result) for result in results}
    if len(shares) > 1:
        return "sparsity"
    if len({result.target for result in results}) == 1:
        for axis in ("α", "samples"):
            if len({place_of(result, axis) for result in results} - {None}) >= _ENOUGH:
                return axis
    return ""


def place_of(result: PointResult, axis: str) -> float | None:
    """Where a point stands on an axis; None if nowhere."""
    assert result.point is not None
    if axis == "α":
        return result.point.alpha
    if axis == "samples":
        samples = result.value_of("samples")
        return float(samples) if samples is not None and samples.isdecimal() else None
    return share_of(result)


def share_of(result: PointResult) -> float | None:
    """The sparsity of a point; of a pattern its share; None for a pattern that is none."""
    assert result.point is not None
    if result.point.pattern is None:
        return result.point.sparsity
    n, _, m = result.point.pattern.partition(":")
    is_pattern = n.isdecimal() and m.isdecimal() and 0 < int(n) <= int(m) < 2**31
    return 1 - int(n) / int(m) if is_pattern else None


def _lines(results: Sequence[PointResult], axis: str, names: Mapping[str, str]) -> Iterator[Series]:
    found: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for result in results:
        x, value = place_of(result, axis), result.metric.value
        if x is not None and value is not None:
            assert result.point is not None
            is_pattern = result.point.pattern is not None and axis == "sparsity"
            found.setdefault((names[result.key], is_pattern), []).append((x, value))
    for (name, is_pattern), values in found.items():
        yield Series(name, *_sorted(values), is_pattern)


def _dots(
    results: Sequence[PointResult], rows: Sequence[str], names: Mapping[str, str]
) -> Iterator[Series]:
    found: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        if result.metric.value is not None:
            row = float(rows.index(names[result.key]))
            found.setdefault(result.target, []).append((row, result.metric.value))
    for target, values in found.items():
        yield Series(target, *_sorted(values))


def _sorted(
    values: Sequence[tuple[float, float]],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    points, found = zip(*sorted(values), strict=True)
    return points, found


def names_of(results: Sequence[PointResult], axis: str) -> dict[str, str]:
    """By key, recipe or method, and what tells it from other points of that name but an axis."""
    told = told_apart(results, {"α": "alpha", "samples": "samples"}.get(axis, "target"))
    return {x.key: f"{called(x)} {told[x.key]}".strip() for x in results}


def _measured(result: PointResult) -> str:
    """What is the same for points that compare with each other."""
    metric = result.metric
    on = (metric.name, metric.tokens, metric.images, sorted((result.measure or {}).items()))
    return repr((result.model.digest, *on))
