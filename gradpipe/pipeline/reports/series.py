"""A sweep's points as lines: for each way to prune, the measure against what was varied."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gradpipe.errors import InputError
from gradpipe.pipeline.reports.points import PointResult

RESULTS = "results.jsonl"
_VARIED = ("grad_norm", "alpha", "group", "allocation", "update")
_MEASURES = {"perplexity": "perplexity", "top1": "top-1 accuracy"}


@dataclass(frozen=True, slots=True)
class Series:
    """One line."""

    name: str
    points: tuple[float, ...]  # ascending
    values: tuple[float, ...]
    is_pattern: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """All that a sweep's folder holds."""

    title: str
    results: tuple[PointResult, ...]
    axis: str  # what was varied: sparsity, or α where that alone was
    measure: str
    series: tuple[Series, ...]
    dense: float | None

    @classmethod
    def read(cls, folder: Path, title: str) -> Self:
        """The points in a folder; InputError for a line that is none. A torn last line is none."""
        path, found = folder / RESULTS, []
        *lines, _ = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                found.append(PointResult.from_json(json.loads(line)))
            except (InputError, ValueError, RecursionError) as error:
                raise InputError(
                    f"{path}, line {number}: {error}: mend or remove that line"
                ) from error
        if not found:
            raise InputError(f"{path} holds no point: let pipe sweep go on")
        return cls.of(title, found)

    @classmethod
    def of(cls, title: str, results: Sequence[PointResult]) -> Self:
        """Lines of points."""
        pruned = [result for result in results if result.point is not None]
        dense = [x.metric.value for x in results if x.point is None and x.metric.value is not None]
        is_alpha = _is_alpha(pruned)
        return cls(
            title=title,
            results=tuple(results),
            axis="α" if is_alpha else "sparsity",
            measure=_MEASURES.get(results[0].metric.name, results[0].metric.name),
            series=tuple(_series(pruned, is_alpha=is_alpha)),
            dense=dense[0] if dense else None,
        )

    @property
    def is_better_higher(self) -> bool:
        """True for an accuracy."""
        return self.results[0].metric.name == "top1"


def _is_alpha(results: Iterable[PointResult]) -> bool:
    """True if all points have one target and differ in α."""
    targets = {result.target for result in results}
    alphas = {x.point.alpha for x in results if x.point is not None and x.point.alpha is not None}
    return len(targets) == 1 and len(alphas) > 2


def _series(results: Sequence[PointResult], *, is_alpha: bool) -> list[Series]:
    found: dict[tuple[str, bool], dict[float, float]] = {}
    for result in results:
        point, value = result.point, result.metric.value
        x = None if point is None else _place(result, is_alpha=is_alpha)
        if point is not None and x is not None and value is not None:
            is_pattern = point.pattern is not None and not is_alpha
            name = series_name(result, results, without="alpha" if is_alpha else None)
            found.setdefault((name, is_pattern), {})[x] = value
    return [
        Series(name, *_sorted(values), is_pattern) for (name, is_pattern), values in found.items()
    ]


def _sorted(values: dict[float, float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    points = tuple(sorted(values))
    return points, tuple(values[point] for point in points)


def _place(result: PointResult, *, is_alpha: bool) -> float | None:
    """Where a point stands: its α, or the share that was asked for."""
    assert result.point is not None
    if is_alpha:
        return result.point.alpha
    return share_of(result)


def share_of(result: PointResult) -> float | None:
    """The sparsity of a point; of a pattern its share; None for a pattern that is none."""
    assert result.point is not None
    if result.point.pattern is None:
        return result.point.sparsity
    n, _, m = result.point.pattern.partition(":")
    is_pattern = n.isdecimal() and m.isdecimal() and 0 < int(n) <= int(m) < 2**31
    return 1 - int(n) / int(m) if is_pattern else None


def series_name(
    result: PointResult, among: Sequence[PointResult], without: str | None = None
) -> str:
    """Recipe or method, and what tells it from other points of that name."""
    called = _called(result)
    alike = [x for x in among if _called(x) == called]
    words = [called]
    for field in _VARIED:
        value = result.value_of(field)
        if field != without and value and len({x.value_of(field) for x in alike}) > 1:
            words.append(value)
    if len({x.store.digest for x in alike}) > 1:
        words.append(result.store.name)
    return " ".join(words)


def _called(result: PointResult) -> str:
    return "" if result.point is None else result.point.recipe or result.point.method
