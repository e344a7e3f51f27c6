"""A sweep's points as lines: for each way to prune, the measure against what was varied."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gradpipe.errors import InputError
from gradpipe.pipeline.reports.points import NAMED, RESULTS, PointResult, called, read_points

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
    """All that a sweep's folder holds."""

    title: str
    results: tuple[PointResult, ...]
    axis: str  # what was varied: sparsity; α or samples, where one target was pruned; or neither
    rows: tuple[str, ...]  # if neither: the ways to prune, and a series for each target
    measure: str
    series: tuple[Series, ...]
    dense: float | None

    @classmethod
    def read(cls, folder: Path, title: str) -> Self:
        """The points in a folder; InputError if one line is none, or all are torn."""
        found = read_points(folder / RESULTS, "mend or remove that line")
        if not found:
            raise InputError(f"{folder / RESULTS} holds no point: let pipe sweep go on")
        return cls.of(title, found)

    @classmethod
    def of(cls, title: str, results: Sequence[PointResult]) -> Self:
        """Lines of points, or dots."""
        pruned = [result for result in results if result.point is not None]
        dense = [x.metric.value for x in results if x.point is None and x.metric.value is not None]
        axis = _axis_of(pruned)
        rows = () if axis else tuple(dict.fromkeys(series_name(x, pruned) for x in pruned))
        return cls(
            title=title,
            results=tuple(results),
            axis=axis,
            rows=rows,
            measure=_MEASURES.get(results[0].metric.name, results[0].metric.name),
            series=tuple(_lines(pruned, axis) if axis else _dots(pruned, rows)),
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


def _lines(results: Sequence[PointResult], axis: str) -> Iterator[Series]:
    found: dict[tuple[str, bool], dict[float, float]] = {}
    for result in results:
        x, value = place_of(result, axis), result.metric.value
        if x is not None and value is not None:
            assert result.point is not None
            is_pattern = result.point.pattern is not None and axis == "sparsity"
            name = series_name(result, results, without=axis)
            found.setdefault((name, is_pattern), {})[x] = value
    for (name, is_pattern), values in found.items():
        yield Series(name, *_sorted(values), is_pattern)


def _dots(results: Sequence[PointResult], rows: Sequence[str]) -> Iterator[Series]:
    found: dict[str, dict[float, float]] = {}
    for result in results:
        if result.metric.value is not None:
            row = rows.index(series_name(result, results))
            found.setdefault(result.target, {})[float(row)] = result.metric.value
    for target, values in found.items():
        yield Series(target, *_sorted(values))


def _sorted(values: dict[float, float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    points = tuple(sorted(values))
    return points, tuple(values[point] for point in points)


def series_name(result: PointResult, among: Sequence[PointResult], without: str = "") -> str:
    """Recipe or method, and what tells it from other points of that name but for an axis."""
    alike = [x for x in among if called(x) == called(result)]
    words = [called(result)]
    for field in NAMED:
        value = result.value_of(field)
        is_axis = without == {"alpha": "α"}.get(field, field)
        if value and not is_axis and len({x.value_of(field) for x in alike} - {None}) > 1:
            words.append(f"{value} samples" if field == "samples" else value)
    return " ".join(words)
