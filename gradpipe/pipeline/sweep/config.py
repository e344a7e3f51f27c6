"""What a sweep is asked to do: the options of `pipe prune`, many several times, and `pipe eval`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from gradpipe.errors import InputError
from gradpipe.options import Option, check_options, number, option_fields, refuse_given, spelled
from gradpipe.pipeline.evaluate_config import EvalConfig
from gradpipe.pipeline.options import (
    BatchSize,
    Device,
    Dtype,
    Exclude,
    Include,
    Model,
    SeqLen,
    Task,
)
from gradpipe.pipeline.prune.config import PruneConfig
from gradpipe.pipeline.studies import STUDIES
from gradpipe.stages.data.config import DataConfig
from gradpipe.store.shard import Shard

AUTO = "auto"  # of --alpha
_OF_PRUNE, _OF_EVAL = option_fields(PruneConfig), option_fields(EvalConfig)


def _several(name: str) -> Option:
    """An option of `pipe prune` that may be given more than once: an axis of the grid."""
    own = _OF_PRUNE[name]
    text = own.option.help.removesuffix(".").removesuffix(", repeatable")
    return replace(
        own.option, help=f"{text}; repeatable.", flag=own.flag[2:], default=own.shown_default
    )


def _same(name: str) -> Option:
    """An option of `pipe prune` that all points share."""
    return replace(_OF_PRUNE[name].option, default=_OF_PRUNE[name].shown_default)


def _alpha(text: str) -> float | str:
    """An α as the user wrote it, or that it is to be chosen."""
    return AUTO if text == AUTO else number(text, "--alpha", f"a number, 0 or more, or {AUTO}")


def _is_alpha(alpha: float | str) -> bool:
    return alpha == AUTO or (isinstance(alpha, float | int) and 0 <= alpha < float("inf"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """Which model, by which stores, which prunings of it, and how they are measured."""

    model: Model
    store: Annotated[str, Option(help="Store: a path or a URL.", is_argument=True)]
    out: Annotated[
        Path, Option(help="Folder of results.jsonl; the same again goes on.", is_argument=True)
    ]
    study: Annotated[
        str | None, Option(help="The grid of a published one: {choices}.", choices=STUDIES)
    ] = None
    sparsities: Annotated[tuple[float, ...], _several("sparsities")] = ()
    patterns: Annotated[tuple[str, ...], _several("patterns")] = ()
    methods: Annotated[tuple[str, ...], _several("method")] = ()
    scores: Annotated[tuple[str, ...], _several("score")] = ()
    recipes: Annotated[tuple[str, ...], _several("recipe")] = ()
    grad_norms: Annotated[tuple[str, ...], _several("grad_norm")] = ()
    alphas: Annotated[
        tuple[float | str, ...],
        replace(
            _several("alpha"),
            help="`a` in formulas, or auto: the best on calibration text; repeatable.",
            accepts=_is_alpha,
            expected=f"a finite number, 0 or more, or {AUTO}",
            parse=_alpha,
            metavar="FLOAT",
        ),
    ] = ()
    groups: Annotated[tuple[str, ...], _several("group")] = ()
    updates: Annotated[tuple[str, ...], _several("update")] = ()
    allocations: Annotated[tuple[str, ...], _several("allocation")] = ()
    curvature: Annotated[str | None, _same("curvature")] = None
    allocation_score: Annotated[str | None, _same("allocation_score")] = None
    mixed_patterns: Annotated[bool, _same("mixed_patterns")] = False
    with_stores: Annotated[
        tuple[str, ...],
        Option(flag="with-store", help="Prune by this store too; repeatable.", metavar="STORE"),
    ] = ()
    include: Include = ()
    exclude: Exclude = ()
    allow_mismatch: Annotated[bool, _same("allow_mismatch")] = False
    workers: Annotated[int | None, _same("workers")] = None
    cache: Annotated[Path | None, _same("cache")] = None
    device: Device = "auto"
    task: Task = None
    data: DataConfig = field(default_factory=lambda: DataConfig(name="wikitext2"))
    seq_len: SeqLen = None
    max_windows: Annotated[int | None, _OF_EVAL["max_windows"].option] = None
    batch_size: BatchSize = 1
    dtype: Dtype = "auto"
    alpha_dataset: Annotated[
        str | None,
        Option(help="Calibration text for --alpha auto.", default="the store's"),
    ] = None
    shard: Annotated[
        Shard | None, replace(_OF_PRUNE["shard"].option, help="Do the I-th of every N points.")
    ] = None
    keep: Annotated[bool, Option(help="Write checkpoints too, to OUT/checkpoints.")] = False

    def __post_init__(self) -> None:
        """Refuse what cannot be meant by itself; the grid says what fits together."""
        check_options(self)
        if self.study is not None:
            refuse_given(self, AXES, f"--study {self.study} sets the grid")
            if STUDIES[self.study].needs_stores and not self.with_stores:
                raise InputError(
                    f"--study {self.study}: it compares stores of several numbers of samples: "
                    "name the others by --with-store"
                )
        if self.alpha_dataset is not None and AUTO not in self.alphas:
            refuse_given(self, ("alpha_dataset",), "only --alpha auto reads it")
        for name in (*AXES, "with_stores"):
            self._check_twice(name)

    def _check_twice(self, name: str) -> None:
        values = getattr(self, name)
        given = values if isinstance(values, tuple) else ()
        if twice := [value for value in given if given.count(value) > 1]:
            raise InputError(f"{spelled(self, name)}: {twice[0]} is given twice: leave one out")

    @property
    def grids(self) -> tuple[SweepConfig, ...]:
        """The same, less the study: a config for each of its grids."""
        if self.study is None:
            return (self,)
        return tuple(replace(self, study=None, **axes) for axes in STUDIES[self.study].grids)

    @property
    def stores(self) -> tuple[str, ...]:
        """All of them."""
        return (self.store, *self.with_stores)

    @property
    def evaluation(self) -> EvalConfig:
        """How each point is measured."""
        return EvalConfig(
            model=self.model,
            task=self.task,
            data=self.data,
            seq_len=self.seq_len,
            max_windows=self.max_windows,
            batch_size=self.batch_size,
            device=self.device,
            dtype=self.dtype,
        )


AXES = (  # of the grid, but for stores
    *("sparsities", "patterns", "methods", "scores", "recipes", "grad_norms", "alphas"),
    *("groups", "updates", "allocations", "curvature", "allocation_score", "mixed_patterns"),
)
