"""The report beside a pruned checkpoint, and its card: a README.md with the Hub's metadata.

The Hub reads the metadata (https://huggingface.co/docs/hub/model-cards): which model it was made
from, tags, and as `model-index` what was measured.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from gradpipe.errors import InputError, one_line
from gradpipe.pipeline.places import REPORT, is_writable
from gradpipe.pipeline.reports.evaluations import Evaluation
from gradpipe.pipeline.reports.results import Accuracy, Metrics, PruneReport
from gradpipe.store.lock import locked
from gradpipe.store.objects import disk_errors, write_durably

CARD = "README.md"
_TEXT, _IMAGES = "text-generation", "image-classification"  # as the Hub names tasks


def write_report(folder: Path, report: PruneReport) -> None:
    """Write `pruning.json` and the model card."""
    document = json.dumps(report.to_json(), indent=1) + "\n"
    write_durably(folder / REPORT, document.encode())
    write_durably(folder / CARD, model_card(report).encode())


def model_card(report: PruneReport) -> str:
    """A README.md that the Hub shows."""
    order = report.order
    data = ModelCardData(
        base_model=order.model if order.revision is not None else None,  # a local one has no page
        library_name="transformers",
        tags=["pruned", "sparse", "gradpipe"],
    )
    return f"""---
{data.to_yaml()}
---
# {order.model}, pruned

| | |
|---|---|
| method | {order.method} |
| pattern | {order.pattern} |
| sparsity of the pruned layers | {report.achieved:.4f} |
| of all weights of the blocks | {report.blocks.sparsity:.4f} |
| of the whole checkpoint | {report.file.sparsity:.4f} |
| statistics | {", ".join(order.statistics) or "none"} |
| gradient store | `{order.store}` |

Made with gradpipe {order.gradpipe}:

    {order.command}

Sparsity of each layer: `pruning.json`. The weights are dense tensors with zeros in them.
"""


def check_card(folder: Path) -> None:
    """InputError unless the folder is a pruned checkpoint whose card can be read and written."""
    for name in (REPORT, CARD):
        if not (folder / name).is_file():
            raise InputError(
                f"--card: {folder} has no {name}, expected a folder that pipe prune wrote: "
                "leave --card out"
            )
    if not is_writable(folder):
        raise InputError(f"--card: {folder} cannot be written to: mend it, or leave --card out")
    _read_card(folder)


def _read_card(folder: Path) -> Any:
    """The card, which may be anybody's by now; InputError for metadata that would be lost."""
    path = folder / CARD
    try:
        return ModelCard(path.read_text(encoding="utf-8"))
    except Exception as error:  # of YAML, and of what the Hub's client expects in it
        raise InputError(
            f"--card: the metadata of {path} cannot be read ({one_line(error)}): mend or remove "
            "them, or leave --card out"
        ) from error


def add_results(folder: Path, evaluation: Evaluation) -> None:
    """Put what was measured into the card, in place of what was measured before on the same.

    Several processes may do so. GradpipeError if the disk fails.
    """
    with (
        disk_errors(f"cannot write {folder / CARD}", "make room or leave --card out"),
        locked(folder / ".card.lock", of=folder, wait=True),
    ):
        _add_results(folder, evaluation)


def _add_results(folder: Path, evaluation: Evaluation) -> None:
    card = _read_card(folder)
    new = list(_results(evaluation))
    kept = [
        old
        for old in card.data.eval_results or ()
        if not any(x.is_equal_except_value(old) for x in new)
    ]
    if not (kept or new):
        return
    card.data.model_name = card.data.model_name or evaluation.metrics.model
    card.data.eval_results = [*kept, *new]
    write_durably(folder / CARD, str(card).encode())


def _results(evaluation: Evaluation) -> Iterator[EvalResult]:
    metrics = evaluation.metrics
    if isinstance(metrics, Accuracy):
        yield _result(metrics, _IMAGES, "accuracy", "top-1 accuracy", metrics.top1)
        return
    name = f"perplexity, {metrics.num_windows} windows of {metrics.seq_len} tokens"
    if math.isfinite(metrics.perplexity):  # JSON and the Hub have no infinity
        yield _result(metrics, _TEXT, "perplexity", name, metrics.perplexity)
    if (beside := evaluation.comparison) is not None:
        name = f"KL divergence from {beside.dense}, nats a token"
        yield _result(metrics, _TEXT, "kl_divergence", name, beside.kl_divergence)
    for score in evaluation.tasks:
        yield EvalResult(
            task_type=_TEXT,
            dataset_type=score.task,
            dataset_name=score.task,
            metric_type=score.metric,
            metric_name=score.metric,
            metric_value=score.value,
        )


def _result(
    metrics: Metrics | Accuracy, task: str, kind: str, name: str, value: float
) -> EvalResult:
    return EvalResult(
        task_type=task,
        dataset_type=metrics.dataset,
        dataset_name=metrics.dataset,
        dataset_config=metrics.dataset_config,
        dataset_split=metrics.split,
        dataset_revision=metrics.revision,
        metric_type=kind,
        metric_name=name,
        metric_value=value,
    )
