"""What points are measured by: the perplexity or the top-1 of `pipe eval`, on data drawn once."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from gradpipe.errors import GradpipeError, InputError
from gradpipe.options import recorded_options, refuse_given
from gradpipe.pipeline.evaluate import LESS_MEMORY, evaluation_tokens
from gradpipe.pipeline.evaluate_config import EvalConfig
from gradpipe.pipeline.reports.points import Metric
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.data.images import Images, Processor, load_images
from gradpipe.stages.device import memory_errors
from gradpipe.stages.evaluate.perplexity import perplexity
from gradpipe.stages.evaluate.top1 import top1
from gradpipe.stages.model.load import check_tokens
from gradpipe.stages.model.own_loss import check_next_token
from gradpipe.stages.model.tasks import find_task
from gradpipe.store.objects import digest
from gradpipe.store.schema import IMAGE_CLASSIFICATION

Advance = Callable[[int], None]  # hears of steps done


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A metric on given data, of the model in whatever state its weights are."""

    metric: Metric  # without a value
    steps: int  # windows or images
    identity: dict[str, Any]  # what tells it from others, as JSON
    compute: Callable[[Advance], float]

    def value(self, advance: Advance) -> float | None:
        """None where a loss or a logit is no number: pruning may have left nothing of the model."""
        with memory_errors(LESS_MEMORY):
            try:
                return self.compute(advance)
            except InputError:
                raise
            except GradpipeError:  # that is what it says of a model
                return None


def measure_of(config: EvalConfig, checkpoint: Checkpoint, model: Any, console: Console) -> Measure:
    """As `pipe eval` measures this model; InputError if model or data cannot be used."""
    if find_task(checkpoint, config.task) == IMAGE_CLASSIFICATION:
        return _of_images(config, checkpoint, model)
    windows, revision = evaluation_tokens(config, checkpoint, console)
    check_next_token(model, checkpoint.name, model.device)
    measure = of_windows(windows, config.batch_size, checkpoint, model)
    return _told(measure, config, revision)


def of_windows(
    windows: npt.NDArray[np.int64], batch_size: int, checkpoint: Checkpoint, model: Any
) -> Measure:
    """Perplexity on windows (windows, tokens); InputError for tokens that the model lacks."""
    check_tokens(windows, checkpoint, model)
    return Measure(
        metric=Metric(name="perplexity", value=None, tokens=windows.size),
        steps=len(windows),
        identity={"windows": [*windows.shape, digest(np.ascontiguousarray(windows).data)]},
        compute=partial(perplexity, model, windows, batch_size),
    )


def _of_images(config: EvalConfig, checkpoint: Checkpoint, model: Any) -> Measure:
    refuse_given(config, ("seq_len", "max_windows"), "images have no windows")
    processor = Processor(checkpoint, model)
    images = load_images(config.data, "evaluation", checkpoint, model)
    labels = np.array(images.labels, dtype=np.int64)
    measure = Measure(
        metric=Metric(name="top1", value=None, images=len(labels)),
        steps=len(labels),
        identity={"labels": [len(labels), digest(labels.data)], "images": _digest(images)},
        compute=partial(top1, model, images, processor, config.batch_size),
    )
    return _told(measure, config, images.revision)


def _digest(images: Images) -> str:
    """Of the files' bytes, in order."""
    files = (images.read(index)[1] for index in range(len(images.labels)))
    return digest("".join(map(digest, files)).encode())


def _told(measure: Measure, config: EvalConfig, revision: str | None) -> Measure:
    """With the options and the data that it is from."""
    options = recorded_options(config) | recorded_options(config.data)
    named = {
        "--dataset": config.data.label,
        "--dataset-config": config.data.config,
        "--revision": revision,
    }
    return replace(measure, identity=measure.identity | options | named)
