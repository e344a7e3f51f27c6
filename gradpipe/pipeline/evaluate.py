"""Evaluation of a checkpoint, dense or pruned: a language model's perplexity, or top-1 accuracy."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from gradpipe.options import refuse_given
from gradpipe.pipeline.evaluate_config import EvalConfig
from gradpipe.pipeline.progress import QUIET, progress_bar
from gradpipe.pipeline.reports.results import Accuracy, Metrics
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.data.config import split_name
from gradpipe.stages.data.images import Processor, load_images
from gradpipe.stages.data.text import load_text
from gradpipe.stages.data.tokens import is_tokens, token_windows, window_length
from gradpipe.stages.data.windows import evaluation_windows
from gradpipe.stages.device import memory_errors, own_torch, resolve_device
from gradpipe.stages.evaluate.perplexity import perplexity
from gradpipe.stages.evaluate.top1 import top1
from gradpipe.stages.model.load import (
    check_tokens,
    dtype_name,
    load_model,
    load_tokenizer,
    resolve_dtype,
)
from gradpipe.stages.model.own_loss import check_next_token, try_one_image
from gradpipe.stages.model.tasks import find_task
from gradpipe.store.schema import CAUSAL_LM, IMAGE_CLASSIFICATION

LESS_MEMORY = "give a smaller --batch-size or --seq-len, or --dtype bfloat16"


@own_torch()
def classify(config: EvalConfig, console: Console = QUIET) -> Accuracy:
    """Top-1 accuracy of an image classifier.

    Args:
        config: The checkpoint, and a folder of class folders or a data set of the Hub.
        console: Where progress and warnings are shown; nowhere by default.

    Returns:
        The share of images whose highest logit is their class, and what it was measured on.

    Raises:
        InputError: If model or data cannot be used.

    Example:
        >>> from gradpipe import DataConfig, EvalConfig, classify
        >>> images = DataConfig(name="imagenette/val")
        >>> classify(EvalConfig(model="deit", data=images)).top1  # doctest: +SKIP
        0.799

    """
    checkpoint = Checkpoint.open(config.model)
    find_task(checkpoint, IMAGE_CLASSIFICATION)
    return classify_opened(checkpoint, config, console)


@own_torch()
def evaluate(config: EvalConfig, console: Console = QUIET) -> Metrics:
    """Perplexity of a language model, on windows of text that do not overlap.

    Args:
        config: The checkpoint, dense or pruned, and the text.
        console: Where progress and warnings are shown; nowhere by default.

    Returns:
        exp of the mean next-token cross-entropy over all windows, and what it was measured on.

    Raises:
        InputError: If model or data cannot be used.

    Example:
        >>> from gradpipe import DataConfig, EvalConfig, evaluate
        >>> text = DataConfig(name="stdlib")
        >>> metrics = evaluate(EvalConfig(model="embedded", data=text, seq_len=64, max_windows=8))
        >>> metrics.num_tokens, metrics.perplexity < 60
        (512, True)

    """
    return next(evaluate_each([config.model], config, console))


def evaluate_each(
    models: Iterable[str], config: EvalConfig, console: Console = QUIET
) -> Iterator[Metrics]:
    """Measure checkpoints that share the first one's tokenizer, on text tokenised once."""
    text = None
    for checkpoint in map(Checkpoint.open, models):
        find_task(checkpoint, CAUSAL_LM)
        text = text or EvaluationText(config, checkpoint, console)
        with memory_errors(LESS_MEMORY):
            model = text.load(checkpoint)
            with text.progress("windows") as advance:
                value = perplexity(model, text.windows, config.batch_size, advance)
        yield text.metrics(checkpoint, value, model.dtype)


def classify_opened(checkpoint: Checkpoint, config: EvalConfig, console: Console) -> Accuracy:
    """Top-1 accuracy of a checkpoint of images that is open; `config.model` is left aside."""
    refuse_given(config, ("seq_len", "max_windows"), "images have no windows")
    device = resolve_device(config.device)
    with memory_errors("give a smaller --batch-size"):
        model = load_model(checkpoint, resolve_dtype(config.dtype, checkpoint), device)
        try_one_image(model, checkpoint.name, device)
        processor = Processor(checkpoint, model)
        images = load_images(config.data, "evaluation", checkpoint, model)
        with progress_bar(console, "evaluating", len(images.labels), "images") as advance:
            value = top1(model, images, processor, config.batch_size, advance)
    return Accuracy(
        top1=value,
        model=checkpoint.label,
        dataset=config.data.label,
        dataset_config=config.data.config,
        split=split_name(config.data, "evaluation"),
        revision=images.revision,
        num_images=len(images.labels),
        dtype=dtype_name(model.dtype),
    )


class EvaluationText:
    """Windows of text, drawn once; models of it, loaded and found to fit; what is said of them."""

    def __init__(self, config: EvalConfig, first: Checkpoint, console: Console) -> None:
        """`first` is the checkpoint whose tokenizer all share."""
        self._config, self._console = config, console
        self._device = resolve_device(config.device)
        self.windows, self._revision = evaluation_tokens(config, first, console)

    def load(self, checkpoint: Checkpoint) -> Any:
        """A model on the device; InputError if it cannot be measured on these windows."""
        model = load_model(checkpoint, resolve_dtype(self._config.dtype, checkpoint), self._device)
        check_tokens(self.windows, checkpoint, model)
        check_next_token(model, checkpoint.name, self._device)
        return model

    def progress(self, unit: str, each: int = 1) -> AbstractContextManager[Callable[[int], None]]:
        """A bar over the windows, each of so many units."""
        count, seq_len = self.windows.shape
        tokens = seq_len if each == 1 else 0
        return progress_bar(self._console, "evaluating", count * each, unit, tokens)

    def metrics(self, checkpoint: Checkpoint, value: float, dtype: torch.dtype) -> Metrics:
        """A perplexity and its conditions."""
        data = self._config.data
        return Metrics(
            perplexity=value,
            model=checkpoint.label,
            dataset=data.label,
            dataset_config=data.config,
            split=split_name(data, "evaluation"),
            revision=self._revision,
            num_windows=len(self.windows),
            seq_len=self.windows.shape[1],
            num_tokens=self.windows.size,
            dtype=dtype_name(dtype),
        )


def evaluation_tokens(
    config: EvalConfig, checkpoint: Checkpoint, console: Console
) -> tuple[npt.NDArray[np.int64], str | None]:
    """What to measure on, (windows, tokens), and the commit that it is from."""
    name = config.data.name
    seq_len = window_length(name, config.seq_len, checkpoint)
    if is_tokens(name):
        return token_windows(name, seq_len, config.max_windows), None
    tokenizer = load_tokenizer(checkpoint)
    text = load_text(config.data, "evaluation", tokenizer)
    with progress_bar(console, "tokenising", 1, "texts") as advance:
        windows = evaluation_windows(name, text, tokenizer, seq_len, config.max_windows)
        advance(1)
    return windows, text.revision
