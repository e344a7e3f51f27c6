"""What evaluation is asked to do: options, each checked alone."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from gradpipe.options import Option, check_options, refuse_given
from gradpipe.pipeline.options import BatchSize, Device, Dtype, Model, SeqLen, Task
from gradpipe.stages.data.config import DataConfig

SCHEDULES = ("resident", "streamed")


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
    schedule: Annotated[
        str, Option(help="{choices}: the last keeps one block in memory.", choices=SCHEDULES)
    ] = "resident"
    scratch: Annotated[
        Path | None, Option(help="Folder for streamed activations.", default="the system's")
    ] = None
    card: Annotated[bool, Option(help="Add what was measured to the model card.")] = False

    def __post_init__(self) -> None:
        check_options(self)
        if self.schedule == "streamed":
            why = "of a whole model in memory, and --schedule streamed keeps one block of it"
            refuse_given(self, ("compare", "tasks", "latency"), why)
        else:
            refuse_given(self, ("scratch",), "the resident schedule keeps nothing there")
