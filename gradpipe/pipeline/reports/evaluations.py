"""What checkpoints on one text gave, and how it is shown."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gradpipe.pipeline.reports.results import Accuracy, Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One metric of one task, and beside the dense model's where there is one."""

    task: str
    metric: str
    value: float
    error: float | None  # standard error
    num_samples: int
    difference: float | None = None  # to the dense model's
    difference_error: float | None = None  # as if the two were independent: too large, if anything


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A model beside the dense one."""

    dense: str
    dense_perplexity: float
    difference: float
    difference_error: float | None  # standard error over windows; None for a single one
    kl_divergence: float  # nats a token, from the dense model
    top_token_agreement: float  # 0 to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Time and size, on this machine."""

    device: str
    threads: int
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float  # a token
    compressed_layers: int  # by to_sparse_semi_structured, 2:4
    compressed_prefill_seconds: float | None
    compressed_decode_seconds: float | None
    file_bytes: int
    zstd_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """All that was measured of one checkpoint."""

    metrics: Metrics | Accuracy
    comparison: Comparison | None = None
    tasks: tuple[Score, ...] = ()
    latency: Latency | None = None
    dense_latency: Latency | None = None

    def to_json(self) -> dict[str, Any]:
        """The metrics' own fields, and what else there is under its name."""
        more = {
            "compare": self.comparison and asdict(self.comparison),
            "tasks": [asdict(score) for score in self.tasks],
            "latency": self.latency and asdict(self.latency),
            "dense_latency": self.dense_latency and asdict(self.dense_latency),
        }
        return asdict(self.metrics) | {name: x for name, x in more.items() if x}

    def lines(self) -> Iterator[str]:
        """For people to read."""
        yield self.metrics.summary
        if self.comparison is not None:
            yield from _comparison_lines(self.comparison)
        for score in self.tasks:
            yield _score_line(score)
        if self.latency is not None:
            yield from _latency_lines(self.latency)
        if self.dense_latency is not None:
            yield from (f"dense: {line}" for line in _latency_lines(self.dense_latency))


def to_json(evaluations: tuple[Evaluation, ...]) -> dict[str, Any]:
    """One document: the evaluation itself, or several under `models`."""
    if len(evaluations) == 1:
        return evaluations[0].to_json()
    return {"models": [evaluation.to_json() for evaluation in evaluations]}


def to_lines(models: Sequence[str], evaluations: Sequence[Evaluation]) -> str:
    """Of several, each below what was given: the ends of two paths may be alike."""
    if len(evaluations) == 1:
        return "\n".join(evaluations[0].lines())
    named = zip(models, evaluations, strict=True)
    blocks = ([name, *(f"  {line}" for line in x.lines())] for name, x in named)
    return "\n".join(line for block in blocks for line in block)


def _comparison_lines(found: Comparison) -> Iterator[str]:
    error = "" if found.difference_error is None else f" ± {found.difference_error:.4f}"
    yield f"{found.difference:+.4f}{error} to {found.dense}'s {found.dense_perplexity:.4f}"
    yield (
        f"KL divergence from {found.dense} {found.kl_divergence:.4f} nats a token; the same top "
        f"token for {100 * found.top_token_agreement:.2f} %"
    )


def _score_line(score: Score) -> str:
    error = "" if score.error is None else f" ± {score.error:.4f}"
    line = f"{score.task} {score.metric} {score.value:.4f}{error} ({score.num_samples} samples)"
    if score.difference is None:
        return line
    error = "" if score.difference_error is None else f" ± {score.difference_error:.4f}"
    return f"{line}, {score.difference:+.4f}{error} to the dense model's"


def _latency_lines(found: Latency) -> Iterator[str]:
    yield (
        f"prefill {_per_second(found.prompt_tokens, found.prefill_seconds)} "
        f"({found.prompt_tokens} tokens), decode {_per_second(1, found.decode_seconds)}, on "
        f"{found.device}, {found.threads} threads"
    )
    if found.compressed_prefill_seconds is not None and found.compressed_decode_seconds is not None:
        prefill = _per_second(found.prompt_tokens, found.compressed_prefill_seconds)
        yield (
            f"with {found.compressed_layers} layers compressed 2:4: prefill {prefill}, decode "
            f"{_per_second(1, found.compressed_decode_seconds)}"
        )
    share = found.zstd_bytes / max(found.file_bytes, 1)
    yield f"{found.file_bytes:,} bytes of weights; by zstd {found.zstd_bytes:,} ({share:.2f} of it)"


def _per_second(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:,.1f} tokens/s" if seconds > 0 and math.isfinite(seconds) else "-"
