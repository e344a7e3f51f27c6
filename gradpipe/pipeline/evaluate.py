"""Evaluation of a checkpoint, dense or pruned: a language model's perplexity, or top-1 accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
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
from gradpipe.stages.device import memory_errors, resolve_device
from gradpipe.stages.evaluate.perplexity import perplexity
from gradpipe.stages.evaluate.top1 import top1
from gradpipe.stages.model.load import (
    check_tokens,
    dtype_name,
    load_model,
    load_tokenizer,
    resolve_dtype,
)
from gradpipe.stages.model.next_token import check_next_token
from gradpipe.stages.model.one_image import try_one_image
from gradpipe.stages.model.tasks import find_task
from gradpipe.store.schema import CAUSAL_LM, IMAGE_CLASSIFICATION


def measure(config: EvalConfig, console: Console = QUIET) -> Metrics | Accuracy:
    """What the checkpoint's task is measured by; InputError if model or data cannot be used."""
    checkpoint = Checkpoint.open(config.model)
    if find_task(checkpoint, config.task) == IMAGE_CLASSIFICATION:
        return classify_opened(checkpoint, config, console)
    return next(_evaluate_each([checkpoint], config, console))


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
    return _evaluate_each(map(Checkpoint.open, models), config, console)


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


def _evaluate_each(
    checkpoints: Iterable[Checkpoint], config: EvalConfig, console: Console
) -> Iterator[Metrics]:
    device = resolve_device(config.device)
    drawn = None
    for checkpoint in checkpoints:
        find_task(checkpoint, CAUSAL_LM)
        drawn = drawn or evaluation_tokens(config, checkpoint, console)
        windows, revision = drawn
        with memory_errors("give a smaller --batch-size or --seq-len, or --dtype bfloat16"):
            model = load_model(checkpoint, resolve_dtype(config.dtype, checkpoint), device)
            check_tokens(windows, checkpoint, model)
            check_next_token(model, checkpoint.name, device)
            with progress_bar(
                console, "evaluating", len(windows), "windows", windows.shape[1]
            ) as advance:
                value = perplexity(model, windows, config.batch_size, advance)
        yield Metrics(
            perplexity=value,
            model=checkpoint.label,
            dataset=config.data.label,
            dataset_config=config.data.config,
            split=split_name(config.data, "evaluation"),
            revision=revision,
            num_windows=len(windows),
            seq_len=windows.shape[1],
            num_tokens=windows.size,
            dtype=dtype_name(model.dtype),
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
