"""Tasks of lm-evaluation-harness (the extra `tasks`): its names, or a file of one's own.

A file is read as plain YAML, and what would run code in it or load it from elsewhere is refused:
the harness's `!function`, classes and includes, metrics that it would fetch; templates run in
jinja's sandbox. Its data are files in its own folder.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from gradpipe.errors import GradpipeError, InputError, did_you_mean, one_line

_FROM_ELSEWHERE = (  # what of a task would run code, or read it or a prompt from elsewhere
    *("include", "class", "custom_dataset", "unsafe_code", "process_docs", "use_prompt"),
)
_LOCAL = ("json", "csv", "parquet", "text")  # builders of `datasets`: they read files


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    error: float | None  # standard error of the mean
    num_samples: int


@dataclass(frozen=True, slots=True)
class Tasks:
    """Tasks that are there, whose data are not read yet."""

    specs: tuple[str | dict[str, Any], ...]
    manager: Any  # lm_eval's

    @classmethod
    def find(cls, names: Sequence[str]) -> Tasks:
        """InputError if the harness is not installed, or for a name or a file that is no task."""
        try:
            from lm_eval.tasks import TaskManager  # noqa: PLC0415 (an extra, and slow)
        except ImportError as error:
            raise InputError(
                "--tasks needs lm-evaluation-harness: pip install 'gradpipe[tasks]'"
            ) from error
        files = {x: x.endswith((".yaml", ".yml")) or Path(x).is_file() for x in names}
        manager = TaskManager(include_defaults=not all(files.values()))
        for name in names:
            if not files[name] and name not in manager.all_tasks:
                near = did_you_mean(name, manager.all_tasks)
                raise InputError(
                    f"--tasks {name}: expected a task of lm-evaluation-harness, or a .yaml file"
                    f"{near}"
                )
        specs = [_read_file(Path(name)) if files[name] else name for name in names]
        return cls(tuple(specs), manager)

    def score(
        self, model: Any, tokenizer: Any, batch_size: int, *, quiet: bool
    ) -> tuple[TaskScore, ...]:
        """Means and standard errors of a loaded model; InputError if a task cannot be run."""
        from lm_eval import simple_evaluate  # noqa: PLC0415 (an extra, and slow)
        from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

        with _tamed(quiet=quiet):
            try:
                found = simple_evaluate(
                    model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                    tasks=list(self.specs),
                    task_manager=self.manager,
                    log_samples=False,
                    bootstrap_iters=1000,
                )
            except Exception as error:  # the harness, and what it loads, raise from many families
                if isinstance(error, GradpipeError):
                    raise
                raise InputError(f"--tasks: cannot run them: {one_line(error)}") from error
        return tuple(_scores(found))


def _read_file(path: Path) -> dict[str, Any]:
    """A task's file; InputError if it is none, would run code, or read from elsewhere."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"--tasks {path}: cannot read it: {one_line(error)}") from error
    if not isinstance(document, dict) or not isinstance(document.get("task"), str):
        raise InputError(f"--tasks {path}: expected a mapping with a `task`, its name")
    if odd := [key for key in _FROM_ELSEWHERE if key in document]:
        raise InputError(
            f"--tasks {path}: `{odd[0]}` would run code, or read from elsewhere: leave it out"
        )
    _check_metrics(path, document)
    if document.get("dataset_path") not in _LOCAL:
        raise InputError(
            f"--tasks {path}: dataset_path {document.get('dataset_path')}: expected one of "
            f"{', '.join(_LOCAL)}, with data_files beside the file"
        )
    options = document.get("dataset_kwargs")
    if not isinstance(options, dict) or options.keys() != {"data_files"}:
        raise InputError(f"--tasks {path}: expected dataset_kwargs with data_files alone")
    return document | {"dataset_kwargs": {"data_files": _inside(path, options["data_files"])}}


def _check_metrics(path: Path, document: dict[str, Any]) -> None:
    from lm_eval.api.registry import metric_registry  # noqa: PLC0415 (an extra, and slow)

    metrics = document.get("metric_list") or []
    if not isinstance(metrics, list):
        raise InputError(f"--tasks {path}: expected metric_list to be a list")
    known = [*metric_registry]
    for entry in metrics:
        name = entry.get("metric") if isinstance(entry, dict) else entry
        if name not in known or (isinstance(entry, dict) and entry.get("hf_evaluate")):
            raise InputError(
                f"--tasks {path}: metric {name}: expected one of the harness's own, such as acc"
            )


def _inside(path: Path, files: Any) -> Any:
    """Names of data files, by split or alone, as paths in the task's folder."""
    if isinstance(files, dict):
        return {str(split): _inside(path, name) for split, name in files.items()}
    folder = path.resolve().parent
    found = (folder / str(files)).resolve()
    if not found.is_relative_to(folder) or not found.is_file():
        raise InputError(f"--tasks {path}: data file {files}: expected one in the file's folder")
    return str(found)


@contextlib.contextmanager
def _tamed(*, quiet: bool) -> Iterator[None]:
    """The harness with its templates in a sandbox, torch's seed put back, its messages left out."""
    import lm_eval.utils as harness  # noqa: PLC0415 (an extra, and slow)
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    sandbox = ImmutableSandboxedEnvironment(
        undefined=harness.env.undefined, keep_trailing_newline=True
    )
    sandbox.filters["regex_replace"] = harness.regex_replace
    plain, harness.env = harness.env, sandbox
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    silence = contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext()
    try:
        with torch.random.fork_rng(devices=[]), silence:
            yield
    finally:
        harness.env = plain
        logging.disable(level)


def _scores(found: Any) -> Iterator[TaskScore]:
    """Of the harness's `acc,none` and `acc_stderr,none`, by task."""
    for task, row in found["results"].items():
        for key, value in row.items():
            metric, _, rule = key.partition(",")
            if not rule or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = row.get(f"{metric}_stderr,{rule}")
            is_number = isinstance(error, int | float) and math.isfinite(error)
            yield TaskScore(
                task=task,
                metric=metric,
                value=float(value),
                error=float(error) if is_number else None,
                num_samples=int(found.get("n-samples", {}).get(task, {}).get("effective", 0)),
            )
