"""Checkpoints on one text: perplexity, and what else tells a pruned one from the dense."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import hypot
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from gradpipe.errors import InputError
from gradpipe.options import refuse_given
from gradpipe.pipeline.evaluate import LESS_MEMORY, EvaluationText, classify_opened
from gradpipe.pipeline.evaluate_config import EvalConfig, EvalExtras
from gradpipe.pipeline.places import check_scratch
from gradpipe.pipeline.progress import QUIET
from gradpipe.pipeline.reports.card import add_results, check_card
from gradpipe.pipeline.reports.evaluations import Comparison, Evaluation, Latency, Score
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.collect.probe import probe
from gradpipe.stages.device import memory_errors, own_torch, resolve_device
from gradpipe.stages.evaluate.closeness import closeness
from gradpipe.stages.evaluate.latency import NEW_TOKENS, compress_2_4, file_sizes, measure_speed
from gradpipe.stages.evaluate.perplexity import perplexity
from gradpipe.stages.evaluate.streamed import streamed_perplexity
from gradpipe.stages.evaluate.tasks import Tasks, TaskScore
from gradpipe.stages.model.load import check_tokens, load_tokenizer, resolve_dtype
from gradpipe.stages.model.skeleton import find_only_blocks
from gradpipe.stages.model.tasks import find_task
from gradpipe.store.schema import CAUSAL_LM, IMAGE_CLASSIFICATION

_NOTHING = EvalExtras()


@own_torch()
def compare(
    models: Sequence[str],
    config: EvalConfig,
    extras: EvalExtras = _NOTHING,
    console: Console = QUIET,
) -> tuple[Evaluation, ...]:
    """Measure checkpoints on the same text, or images; `config.model` is left aside.

    Those of text share the first one's tokenizer. Raises InputError if models, data and options do
    not fit together, GradpipeError for a loss that is not finite.
    """
    if extras.scratch is not None:
        check_scratch(extras.scratch)
    checkpoints = [Checkpoint.open(name) for name in models]
    cards = [Path(name) for name in models] if extras.card else []  # the Hub's are not ours
    for folder in cards:
        check_card(folder)
    found = _measured(checkpoints, config, extras, console)
    for folder, evaluation in zip(cards, found, strict=False):
        add_results(folder, evaluation)
    return found


def _measured(
    checkpoints: Sequence[Checkpoint], config: EvalConfig, extras: EvalExtras, console: Console
) -> tuple[Evaluation, ...]:
    kinds = {find_task(checkpoint, config.task) for checkpoint in checkpoints}
    if kinds == {IMAGE_CLASSIFICATION}:
        refuse_given(extras, ("compare", "tasks", "latency"), "of text alone, not of images")
        found = (classify_opened(checkpoint, config, console) for checkpoint in checkpoints)
        return tuple(Evaluation(metrics=x) for x in found)
    if kinds != {CAUSAL_LM}:
        raise InputError(
            f"{checkpoints[0].name} and others are for two tasks: give models of text, or of images"
        )
    return tuple(_Bench(config, extras, console, checkpoints[0]).run(checkpoints))


class _Bench:
    """One text, one dense model, and what is measured of each checkpoint."""

    def __init__(
        self, config: EvalConfig, extras: EvalExtras, console: Console, first: Checkpoint
    ) -> None:
        self._config = config
        self._extras = extras
        self._quiet = not console.is_terminal
        self._device = resolve_device(config.device)
        self._tasks = Tasks.find(extras.tasks) if extras.tasks else None
        self._text = EvaluationText(config, first, console)

    def run(self, checkpoints: Sequence[Checkpoint]) -> Iterator[Evaluation]:
        """Each checkpoint, beside the dense one if there is one."""
        name = self._extras.compare
        remedy = LESS_MEMORY if name is None else f"{LESS_MEMORY}; --compare loads two models"
        with memory_errors(remedy):
            dense = None if name is None else self._dense(Checkpoint.open(name))
            for checkpoint in checkpoints:
                yield self._measure(checkpoint, dense)

    def _dense(self, checkpoint: Checkpoint) -> _Dense:
        find_task(checkpoint, CAUSAL_LM)
        model = self._text.load(checkpoint)
        return _Dense(
            label=checkpoint.label,
            model=model,
            scores={(x.task, x.metric): x for x in self._scores(checkpoint, model)},
            latency=self._latency(checkpoint, model, compresses=False),
        )

    def _measure(self, checkpoint: Checkpoint, dense: _Dense | None) -> Evaluation:
        if self._extras.schedule == "streamed":
            return self._streamed(checkpoint)
        model = self._text.load(checkpoint)
        value, comparison = self._perplexity(model, dense)
        found = self._scores(checkpoint, model)
        return Evaluation(
            metrics=self._text.metrics(checkpoint, value, model.dtype),
            comparison=comparison,
            tasks=tuple(_score(x, None if dense is None else dense.scores) for x in found),
            latency=self._latency(checkpoint, model, compresses=True),
            dense_latency=None if dense is None else dense.latency,
        )

    def _streamed(self, checkpoint: Checkpoint) -> Evaluation:
        """One block in memory at a time."""
        skeleton = find_only_blocks(checkpoint, resolve_dtype(self._config.dtype, checkpoint))
        check_tokens(self._text.windows, checkpoint, skeleton.model)
        probe(skeleton, self._device)
        if self._extras.scratch is not None:
            self._extras.scratch.mkdir(parents=True, exist_ok=True)
        with (
            TemporaryDirectory(dir=self._extras.scratch) as folder,
            self._text.progress("block-windows", skeleton.blocks.count) as advance,
        ):
            value = streamed_perplexity(
                skeleton,
                self._text.windows,
                self._config.batch_size,
                self._device,
                Path(folder),
                advance,
            )
        return Evaluation(metrics=self._text.metrics(checkpoint, value, skeleton.model.dtype))

    def _perplexity(self, model: Any, dense: _Dense | None) -> tuple[float, Comparison | None]:
        windows, size = self._text.windows, self._config.batch_size
        with self._text.progress("windows") as advance:
            if dense is None:
                return perplexity(model, windows, size, advance), None
            found = closeness(model, dense.model, windows, size, advance)
        return found.perplexity, Comparison(
            dense=dense.label,
            dense_perplexity=found.dense_perplexity,
            difference=found.perplexity - found.dense_perplexity,
            difference_error=found.difference_error,
            kl_divergence=found.kl_divergence,
            top_token_agreement=found.agreement,
        )

    def _scores(self, checkpoint: Checkpoint, model: Any) -> tuple[TaskScore, ...]:
        if self._tasks is None:
            return ()
        tokenizer, size = load_tokenizer(checkpoint), self._config.batch_size
        return self._tasks.score(model, tokenizer, size, quiet=self._quiet)

    def _latency(self, checkpoint: Checkpoint, model: Any, *, compresses: bool) -> Latency | None:
        """Of the model as it is, and, at last, with its 2:4 sparse layers compressed."""
        if not self._extras.latency:
            return None
        window = self._text.windows[0]
        prompt_T = torch.from_numpy(window[: max(1, len(window) - NEW_TOKENS)])
        prefill, decode = measure_speed(model, prompt_T)
        layers = compress_2_4(model) if compresses else 0
        compressed = measure_speed(model, prompt_T) if layers else (None, None)
        file_bytes, zstd_bytes = file_sizes(checkpoint)
        device = self._device
        is_gpu = device.type == "cuda"
        return Latency(
            device=torch.cuda.get_device_name(device) if is_gpu else device.type,
            threads=torch.get_num_threads(),
            prompt_tokens=len(prompt_T),
            prefill_seconds=prefill,
            decode_seconds=decode,
            compressed_layers=layers,
            compressed_prefill_seconds=compressed[0],
            compressed_decode_seconds=compressed[1],
            file_bytes=file_bytes,
            zstd_bytes=zstd_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dense:
    """The dense model, and what was measured of it alone."""

    label: str
    model: Any
    scores: Mapping[tuple[str, str], TaskScore]
    latency: Latency | None


def _score(own: TaskScore, dense: Mapping[tuple[str, str], TaskScore] | None) -> Score:
    """A score, and how far it is from the dense model's."""
    score = Score(**asdict(own))
    if dense is None:
        return score
    other = dense[own.task, own.metric]
    errors = [x for x in (own.error, other.error) if x is not None]
    return replace(
        score,
        difference=own.value - other.value,
        difference_error=hypot(*errors) if len(errors) == 2 else None,
    )
