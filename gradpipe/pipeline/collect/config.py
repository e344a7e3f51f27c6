"""What stage one is asked to do: options, checked alone and against each other."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from gradpipe.errors import InputError, did_you_mean
from gradpipe.options import Option, check_options, is_given, refuse_given, spelled, unasked
from gradpipe.pipeline.options import (
    BatchSize,
    Device,
    Dtype,
    Exclude,
    Model,
    Overwrite,
    RankTimeout,
    RecipeName,
    SeqLen,
    ShardOption,
    Task,
)
from gradpipe.pipeline.recipes import RECIPES
from gradpipe.stages.data.config import TOKENS, DataConfig
from gradpipe.store.shard import Shard
from gradpipe.store.statistics import DEFAULT_STATISTICS, ENCODINGS, STATISTICS

SCHEDULES = ("auto", "resident", "streamed")


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectConfig:
    """What to collect, from what, into which store."""

    model: Model
    store: Annotated[Path, Option(help="Folder to create.", is_argument=True, is_recorded=False)]
    task: Task = None
    data: DataConfig = field(default_factory=DataConfig)
    num_samples: Annotated[int, Option(help="Calibration windows or images.", least=1)] = 128
    seq_len: SeqLen = None
    seed: Annotated[int, Option(help="Seed of the samples drawn.")] = unasked(0)
    batch_size: BatchSize = 1
    statistics: Annotated[
        tuple[str, ...], Option(help=f"Of {', '.join(STATISTICS)}, repeatable.", separator=",")
    ] = unasked(DEFAULT_STATISTICS)
    recipe: RecipeName = None
    encoding: Annotated[str, Option(help="{choices}.", choices=ENCODINGS)] = "compact"
    blocks: Annotated[
        str | None, Option(help="Path of the block list, as model.layers.", default="found")
    ] = None
    include: Annotated[
        tuple[str, ...],
        Option(help="Of layers outside the blocks, these too; repeatable.", is_regex=True),
    ] = ()
    exclude: Exclude = ()
    schedule: Annotated[
        str,
        Option(
            help="{choices}: the last keeps one block in memory at a time.",
            choices=SCHEDULES,
            is_recorded=False,
        ),
    ] = "auto"
    scratch: Annotated[
        Path | None,
        Option(help="Folder for streamed activations.", default="in the store", is_recorded=False),
    ] = None
    device: Device = "auto"
    device_map: Annotated[
        str | None,
        Option(
            help="Spread a resident model over GPUs: auto, balanced, balanced_low_0, sequential, "
            "or a JSON file.",
            is_recorded=False,
        ),
    ] = None
    dtype: Dtype = "auto"
    checkpoint_every: Annotated[
        int | None,
        Option(
            help="Samples between snapshots; streamed, each block is one.",
            least=1,
            default="under 5 % of the time",
            is_recorded=False,
        ),
    ] = None
    shard: ShardOption = None
    finalize: Annotated[
        bool, Option(help="If this shard is the last to finish, merge them.", is_recorded=False)
    ] = False
    rank_timeout: RankTimeout = 1800
    overwrite: Overwrite = False

    def __post_init__(self) -> None:
        check_options(self)
        self._resolve_statistics()
        if self.schedule == "resident":
            refuse_given(self, ("scratch",), "the resident schedule keeps nothing there")
        if self.schedule == "streamed":
            why = "the streamed schedule saves after each block"
            refuse_given(self, ("checkpoint_every",), why)
        if self.schedule != "resident":
            refuse_given(self, ("device_map",), "without --schedule resident no model is spread")
        if self.device_map is not None and self.device != "auto":
            raise InputError(
                f"--device {self.device}: --device-map {self.device_map} gives the devices: leave "
                "out the one or the other"
            )
        if self.data.name.endswith(TOKENS):
            refuse_given(self, ("seed",), "a file of tokens is taken as it is, nothing is drawn")
        if self.shard is None:
            refuse_given(self, ("finalize",), "without --shard there is nothing to wait for")
        elif self.shard.count > self.num_samples:
            raise InputError(
                f"--shard {self.shard.index}/{self.shard.count}: more shards than the "
                f"{self.num_samples} samples: give at most one a sample"
            )

    @property
    def job(self) -> Shard:
        """Which of several jobs this is; the only one, unless it is said."""
        return self.shard or Shard(0, 1)

    def _resolve_statistics(self) -> None:
        """Those of the recipe, unless some are given by name."""
        if self.recipe is not None:
            if is_given(self, "statistics"):
                raise InputError(
                    f"{spelled(self, 'recipe')}: it stands for statistics, which --statistics "
                    "gives: leave out the one or the other"
                )
            object.__setattr__(self, "statistics", unasked(RECIPES[self.recipe].statistics))
        unknown = [name for name in self.statistics if name not in STATISTICS]
        if unknown or not self.statistics or len(set(self.statistics)) != len(self.statistics):
            near = did_you_mean(unknown[0], STATISTICS) if unknown else ""
            raise InputError(
                f"--statistics {','.join(self.statistics)!r}: expected different names of "
                f"{', '.join(STATISTICS)}{near}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportConfig:
    """Which files of the reference's to import, for which checkpoint, into which store."""

    model: Model
    store: Annotated[Path, Option(help="Folder to create.", is_argument=True, is_recorded=False)]
    l1: Annotated[
        Path | None, Option(help="gradients_aggregrate_norm_l1_model_*.pth", is_path=True)
    ] = None
    l2: Annotated[
        Path | None, Option(help="gradients_aggregrate_norm_l2_model_*.pth", is_path=True)
    ] = None
    activations: Annotated[
        str | None,
        Option(help="Store of the same model to take activations from.", is_recorded=False),
    ] = None
    num_samples: Annotated[int, Option(help="Samples the reference summed over.", least=1)] = 128
    scale: Annotated[
        float,
        Option(
            help="What the reference scaled gradients by.",
            accepts=lambda scale: 0 < scale < float("inf"),
            expected="a finite number, more than 0",
        ),
    ] = 100.0
    overwrite: Overwrite = False

    def __post_init__(self) -> None:
        if self.l1 is None and self.l2 is None:
            raise InputError("nothing to import: give --l1 FILE, --l2 FILE or both")
        check_options(self)
