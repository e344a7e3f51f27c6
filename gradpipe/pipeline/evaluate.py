"""Evaluation: the perplexity of a checkpoint, dense or pruned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from rich.console import Console

from gradpipe.errors import InputError
from gradpipe.pipeline.progress import QUIET, progress_bar
from gradpipe.stages.checkpoint import Checkpoint
from gradpipe.stages.device import resolve_device
from gradpipe.stages.model import (
    check_tokens,
    load_model,
    load_tokenizer,
    resolve_dtype,
    sequence_length,
)
from gradpipe.stages.perplexity import perplexity
from gradpipe.stages.samples import DataConfig, evaluation_windows, load_text
from gradpipe.stages.tokens import is_tokens, token_length, token_windows


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Which checkpoint to measure, on which text."""

    model: str  # directory, Hub id, or `embedded`
    data: DataConfig = field(default_factory=lambda: DataConfig(name="wikitext2"))
    seq_len: int | None = None  # tokens; default 2048, or the model's maximum where that is less
    max_windows: int | None = None
    batch_size: int = 1
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name, least in (("seq_len", 2), ("max_windows", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} {value}: expected at least {least}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """A perplexity, and what one must know to compare it."""

    perplexity: float
    model: str
    dataset: str
    revision: str | None
    num_windows: int
    seq_len: int
    num_tokens: int
    dtype: str


def evaluate(config: EvalConfig, console: Console = QUIET) -> Metrics:
    """Measure a checkpoint; InputError if model or data cannot be used."""
    return next(evaluate_each([config.model], config, console))


def evaluate_each(
    models: Iterable[str], config: EvalConfig, console: Console = QUIET
) -> Iterator[Metrics]:
    """Measure checkpoints that share `config.model`'s tokenizer, on text tokenised once."""
    device = resolve_device(config.device)
    checkpoint = Checkpoint.open(config.model)
    windows, revision = _windows(config, checkpoint)
    for name in models:
        checkpoint = Checkpoint.open(name)
        model = load_model(checkpoint, resolve_dtype(config.dtype, checkpoint), device)
        check_tokens(windows, checkpoint, model)
        with progress_bar(
            console, "evaluating", len(windows), "windows", windows.shape[1]
        ) as advance:
            value = perplexity(model, windows, config.batch_size, advance)
        yield Metrics(
            perplexity=value,
            model=name,
            dataset=config.data.name,
            revision=revision,
            num_windows=len(windows),
            seq_len=windows.shape[1],
            num_tokens=windows.size,
            dtype=str(model.dtype).removeprefix("torch."),
        )


def _windows(
    config: EvalConfig, checkpoint: Checkpoint
) -> tuple[npt.NDArray[np.int64], str | None]:
    """What to measure on, (windows, tokens), and the commit that it is from."""
    name = config.data.name
    if is_tokens(name):
        seq_len = sequence_length(config.seq_len or token_length(name), checkpoint)
        return token_windows(name, seq_len, config.max_windows), None
    seq_len = sequence_length(config.seq_len, checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    text = load_text(config.data, "evaluation")
    return evaluation_windows(name, text, tokenizer, seq_len, config.max_windows), text.revision
