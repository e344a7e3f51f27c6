"""The points of a grid: all that was given more than once, crossed, less what makes no sense.

Methods, formulas and recipes are rows of one axis, sparsities and patterns columns of another. The
options of all other axes are kept for a row and a column where `pipe prune` takes them, as many at
once as it takes: Wanda has no α, and is one point whatever number of them there are. An option that
no point takes is a mistake, and refused in the words of `pipe prune`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from gradpipe.errors import InputError
from gradpipe.options import recorded_options
from gradpipe.pipeline.prune.config import PruneConfig
from gradpipe.pipeline.sweep.config import AUTO, SweepConfig

Choice = tuple[str, Any]  # a field of PruneConfig, and its value
_AXES = {  # field of SweepConfig -> of PruneConfig, of which one that is dropped first comes last
    "groups": "group",
    "updates": "update",
    "allocations": "allocation",
    "mixed_patterns": "mixed_patterns",
    "allocation_score": "allocation_score",
    "curvature": "curvature",
    "grad_norms": "grad_norm",
    "alphas": "alpha",
}
_ANY_ALPHA = 100.0  # stands for the one that is yet to be chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One pruning: its options, checked against each other."""

    config: PruneConfig
    chooses_alpha: bool  # `config` has any in its place


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The points of a sweep, in order, and what was left out of it."""

    points: tuple[Point, ...]
    left_out: tuple[str, ...]  # `--alpha of wanda`

    @classmethod
    def of(cls, config: SweepConfig) -> Grid:
        """InputError for an option that no point takes."""
        points: dict[str, Point] = {}
        left_out: dict[str, None] = {}
        for grid in config.grids:
            made, dropped = _points(grid)
            points |= {_identity(point): point for point in made}
            left_out |= dict.fromkeys(dropped if config.study is None else ())
        return cls(points=tuple(points.values()), left_out=tuple(left_out))


def _points(config: SweepConfig) -> tuple[list[Point], list[str]]:
    """Of one grid without a study: its points, and what each row or column has no use for."""
    taken: set[Choice] = set()
    refused: dict[Choice, InputError] = {}
    dropped: set[tuple[str, str, str]] = set()
    points = []
    others = [choices for field in _AXES if (choices := _choices(config, field))]
    rows = _choices_of(method=config.methods, score=config.scores, recipe=config.recipes)
    columns = _choices_of(
        sparsities=[(x,) for x in config.sparsities], patterns=[(x,) for x in config.patterns]
    )
    for row, some, column, store in product(rows, product(*others), columns, config.stores):
        point, kept = _largest(config, store, (*row, *column), some)
        points.append(point)
        taken.update(kept)
        for choice in (x for x in some if x not in kept):
            dropped.add((choice[0], _name(row), _name(column)))
            refused.setdefault(choice, _refusal(config, store, (*row, *column, *kept, choice)))
    for choice, error in refused.items():
        if choice not in taken:
            raise error
    return points, _said(dropped, [*map(_name, rows)], [*map(_name, columns)])


def _said(
    dropped: set[tuple[str, str, str]], rows: Sequence[str], columns: Sequence[str]
) -> list[str]:
    """`--alpha of wanda`, `--group of 2:4`: by row where it is in every column, else by column."""
    said: dict[str, None] = {}
    for (field, row, column), _ in sorted((x, None) for x in dropped):
        is_rows = all((field, row, other) in dropped for other in columns)
        is_columns = all((field, other, column) in dropped for other in rows)
        owner = row if is_rows else column if is_columns else f"{row} at {column}"
        said[f"--{field.replace('_', '-')} of {owner}"] = None
    return list(said)


def _choices_of(**fields: Sequence[Any]) -> list[tuple[Choice, ...]]:
    """One field with one of its values each; where none has any, one of nothing."""
    return [((field, x),) for field, values in fields.items() for x in values] or [()]


def _choices(config: SweepConfig, field: str) -> list[Choice]:
    """What was given on one of the other axes."""
    given = getattr(config, field)
    values = given if isinstance(given, tuple) else (given,)
    return [(_AXES[field], value) for value in values if value is not None and value is not False]


def _largest(
    config: SweepConfig, store: str, fixed: tuple[Choice, ...], others: tuple[Choice, ...]
) -> tuple[Point, tuple[Choice, ...]]:
    """The point with as many of the others as fit, and those; the first ones where some exclude.

    Raises InputError if even none of them leaves a pruning.
    """
    for size in range(len(others), 0, -1):
        for some in combinations(others, size):
            with suppress(InputError):
                return _point(config, store, (*fixed, *some)), some
    return _point(config, store, fixed), ()


def _refusal(config: SweepConfig, store: str, choices: tuple[Choice, ...]) -> InputError:
    """Why choices do not go together."""
    try:
        _point(config, store, choices)
    except InputError as error:
        return error
    raise AssertionError(choices)  # pragma: no cover (more would have been kept)


def _point(config: SweepConfig, store: str, choices: tuple[Choice, ...]) -> Point:
    options = dict(choices)
    chooses_alpha = options.get("alpha") == AUTO
    if chooses_alpha:
        options["alpha"] = _ANY_ALPHA
    made = PruneConfig(
        model=config.model,
        store=store,
        out=config.out / "checkpoints",
        include=config.include,
        exclude=config.exclude,
        device=config.device,
        workers=config.workers,
        cache=config.cache,
        allow_mismatch=config.allow_mismatch,
        **options,
    )
    return Point(config=made, chooses_alpha=chooses_alpha)


def _identity(point: Point) -> str:
    """What is the same for points that are one."""
    config = point.config
    goal = (config.store, config.method, config.sparsities, config.patterns)
    return repr((*goal, point.chooses_alpha, recorded_options(config)))


def _name(choices: tuple[Choice, ...]) -> str:
    """A row or a column as the user wrote it."""
    values = [x[0] if isinstance(x, tuple) else x for _, x in choices]
    return str(values[0]) if values else "all"
