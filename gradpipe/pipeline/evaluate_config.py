"""What evaluation is asked to do: options, each checked alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from gradpipe.options import Option, check_options
from gradpipe.pipeline.options import BatchSize, Device, Dtype, Model, SeqLen, Task
from gradpipe.stages.data.config import DataConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Which checkpoint to measure, on which text or images."""

    model: Model
    task: Task = None
    data: DataConfig = field(default_factory=lambda: DataConfig(name="wikitext2"))
    seq_len: SeqLen = None
    max_windows: Annotated[
        int | None, Option(help="Measure on the first ones only.", least=1, default="all")
    ] = None
    batch_size: BatchSize = 1
    device: Device = "auto"
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check_options(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalExtras:
    """What else is measured, beside perplexity."""

    compare: Annotated[
        str | None,
        Option(help="The dense model: difference, KL divergence, the same top token."),
    ] = None
    tasks: Annotated[
        tuple[str, ...],
        Option(
            help="Tasks of lm-evaluation-harness, or .yaml files; comma-separated.",
            separator=",",
        ),
    ] = ()
    latency: Annotated[bool, Option(help="Time prefill and decode; size of the files.")] = False
    card: Annotated[bool, Option(help="Add what was measured to the model card.")] = False

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check_options(self)
