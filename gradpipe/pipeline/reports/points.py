"""What a sweep finds of each point: a line of `results.jsonl`, and the table of many.

A line is one JSON object, of these fields in this order; `docs/sweeps.md` says what each means.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from rich import box
from rich.table import Table

from gradpipe.errors import InputError, StoreError
from gradpipe.options import words
from gradpipe.pipeline.reports.tables import as_text
from gradpipe.store.schema import JsonSpec

RESULTS = "results.jsonl"  # in a sweep's folder
FORMAT = 1  # of a line
SAMPLES = "--num-samples"  # among a line's options: how many the store is of
NAMED = ("grad_norm", "alpha", "group", "allocation", "update", "samples")  # after the method
_TOLD = {SAMPLES, *(f"--{name.replace('_', '-')}" for name in NAMED)}  # of options, by those


@dataclass(frozen=True, slots=True, kw_only=True)
class PointSpec(JsonSpec):
    """What tells a pruning from others; None where it has no say in it."""

    method: str  # or a formula
    sparsity: float | None
    pattern: str | None
    grad_norm: str | None
    alpha: float | None
    group: str | None
    allocation: str | None
    update: str | None
    recipe: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Named(JsonSpec):
    """A model or a store: its name, and the digest of what it holds."""

    name: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric(JsonSpec):
    """What was measured, and on how much."""

    name: str  # perplexity or top1
    value: float | None  # None where it is beyond a float, or no number
    tokens: int | None = None
    images: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Tokens or images, whichever there are."""
        return {key: x for key, x in asdict(self).items() if x is not None or key == "value"}

    @property
    def shown(self) -> str:
        """As tables have it."""
        if self.value is None:
            return "none"
        return f"{100 * self.value:.2f} %" if self.name == "top1" else f"{self.value:.2f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PointResult(JsonSpec):
    """One point: the dense model, or a pruning of it."""

    key: str  # digest of what was asked: point, model, store, how it is measured
    study: str | None
    point: PointSpec | None  # None: the dense model
    options: Mapping[str, Any]  # by flag, those of `pipe prune` that differ from its defaults
    model: Named
    store: Named
    metric: Metric
    zeros: Mapping[str, float]  # shares: of the pruned layers, of the blocks, of the file
    layers: Mapping[str, float]  # shares of zeros
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    measure: Mapping[str, Any] | None = None  # on what, and how: by flag; older lines have none

    def to_json(self) -> dict[str, Any]:
        """The line, as plain JSON values."""
        return {"format": FORMAT} | asdict(self) | {"metric": self.metric.to_json()}

    @classmethod
    def from_json(cls, document: object) -> Self:
        """The result in a line; InputError for anything else."""
        values = dict(document) if isinstance(document, dict) else {}
        try:
            if values.pop("format", None) == FORMAT:
                return super(PointResult, cls).from_json(values)
        except StoreError as error:
            raise InputError(f"not a point of a sweep in format {FORMAT}: {error}") from error
        raise InputError(f"not a point of a sweep in format {FORMAT}")

    @property
    def target(self) -> str:
        """`2:4`, or `50 %`."""
        if self.point is None:
            return "dense"
        return self.point.pattern or f"{100 * (self.point.sparsity or 0):g} %"

    def value_of(self, name: str) -> str | None:
        """A field as tables have it; beside those of the point `target`, `samples`, the store's.

        Of a flag the option as it was given.
        """
        if name in self.options and name != SAMPLES:
            return " ".join(words(name, self.options[name]))
        of_store = {"store": self.store.name, "digest": self.store.digest[:8]}
        others = of_store | {"target": self.target, "samples": self.options.get(SAMPLES)}
        value = others.get(name)
        value = getattr(self.point, name, None) if value is None else value
        if value is None:
            return None
        return f"α {value:g}" if name == "alpha" else str(value)


def read_points(path: Path, remedy: str) -> list[PointResult]:
    """The points in a file, less a torn last line; InputError for a line that is none."""
    found = []
    *lines, _ = path.read_bytes().split(b"\n")  # the last one is torn, or empty
    for number, line in enumerate(lines, 1):
        try:
            found.append(PointResult.from_json(json.loads(line)))
        except (InputError, ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: {error}: {remedy}") from error
    return found


def sweep_table(results: Sequence[PointResult], x: str = "target", *, plain: bool = False) -> Table:
    """A row for each way to prune, a column for each value of `x`; `plain` is Markdown.

    A field is named where points of one method differ in it.
    """
    pruned = [result for result in results if result.point is not None]
    told = told_apart(pruned, x)
    columns = dict.fromkeys(result.value_of(x) or "" for result in pruned)
    cells: dict[str, dict[str, str]] = {}
    for result in pruned:
        first = f"`{called(result)}`" if plain and "*" in called(result) else called(result)
        name = f"{first} {told[result.key]}".strip()  # a formula is no emphasis
        cells.setdefault(name, {})[result.value_of(x) or ""] = result.metric.shown
    table = Table(box=box.MARKDOWN if plain else box.HEAVY_HEAD)
    table.add_column(next((result.metric.name for result in results), ""))
    for column in columns:
        table.add_column(as_text(column), justify="right")
    for dense in (result for result in results if result.point is None):
        table.add_row("dense", *[dense.metric.shown] * len(columns))
    for name, row_cells in cells.items():
        table.add_row(as_text(name), *(row_cells.get(column, "") for column in columns))
    return table


def called(result: PointResult) -> str:
    """What a point is called first: its recipe or method."""
    return "" if result.point is None else result.point.recipe or result.point.method


def told_apart(results: Sequence[PointResult], x: str) -> dict[str, str]:
    """By key, what tells a point from others of its name, beside the field `x`.

    The fields of `NAMED` in which they differ, and of all others those without which two points
    would still be one.
    """
    of_name: dict[str, list[PointResult]] = defaultdict(list)
    for result in results:
        of_name[called(result)].append(result)
    told: dict[str, str] = {}
    for alike in of_name.values():
        fields = [*_fields(alike, x)]
        told |= {one.key: " ".join(filter(None, map(partial(_word, one), fields))) for one in alike}
    return told


def _fields(alike: Sequence[PointResult], x: str) -> Iterator[str]:
    """The fields that tell these apart."""
    cells = {result.key: [result.value_of(x)] for result in alike}
    others = sorted({flag for result in alike for flag in result.options} - _TOLD)
    for name in (*NAMED, "target", *others, "store", "digest"):
        values = {result.key: result.value_of(name) for result in alike}
        if name in NAMED:
            is_told = name != x and len({*values.values()} - {None}) > 1
        else:
            found = {(*cells[key], value) for key, value in values.items()}
            is_told = len(found) > len({*map(tuple, cells.values())})
        if is_told:
            yield name
            for key, cell in cells.items():
                cell.append(values[key])


def _word(result: PointResult, name: str) -> str | None:
    value = result.value_of(name)
    return f"{value} samples" if value and name == "samples" else value
