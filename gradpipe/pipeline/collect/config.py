"""What stage one is asked to do: options, each checked alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gradpipe.errors import InputError
from gradpipe.pipeline.options import check_counts, check_regexes
from gradpipe.stages.collect.estimate import check_schedule
from gradpipe.stages.data.config import DataConfig
from gradpipe.stages.model.tasks import check_task
from gradpipe.store.shard import Shard
from gradpipe.store.statistics import DEFAULT_STATISTICS, ENCODINGS, STATISTICS


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectConfig:
    """What to collect, from what, into which store."""

    model: str  # directory, Hub id, or `embedded`
    store: Path  # a local folder to create
    task: str | None = None  # causal-lm or image-classification; default by the architecture
    data: DataConfig = field(default_factory=DataConfig)
    num_samples: int = 128
    seq_len: int | None = None  # tokens; default 2048, or the model's maximum where that is less
    seed: int = 0
    batch_size: int = 1
    statistics: tuple[str, ...] = DEFAULT_STATISTICS
    encoding: str = "compact"
    blocks: str | None = None  # path of the block list, where it cannot be found
    include: tuple[str, ...] = ()  # regexes: linear layers outside the blocks to collect too
    schedule: str = "auto"  # resident where the model fits in memory, else streamed
    scratch: Path | None = None  # where `streamed` keeps activations; default inside the store
    device: str = "auto"
    dtype: str = "auto"  # the checkpoint's own
    checkpoint_every: int | None = None  # samples between snapshots; default by their cost
    shard: Shard | None = None  # one of several jobs that share the store
    finalize: bool = False  # the last shard to finish merges them all
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        unknown = [name for name in self.statistics if name not in STATISTICS]
        if unknown or not self.statistics or len(set(self.statistics)) != len(self.statistics):
            got = ",".join(self.statistics)
            raise InputError(
                f"--statistics {got!r}: expected different names of {', '.join(STATISTICS)}"
            )
        if self.encoding not in ENCODINGS:
            raise InputError(f"--encoding {self.encoding}: expected one of {', '.join(ENCODINGS)}")
        check_task(self.task)
        check_schedule(self.schedule)
        check_counts(self, {"num_samples": 1, "batch_size": 1, "seq_len": 2, "checkpoint_every": 1})
        check_regexes("--include", self.include)
        if self.shard is not None and self.shard.count > self.num_samples:
            raise InputError(
                f"--shard {self.shard.index}/{self.shard.count}: more shards than the "
                f"{self.num_samples} samples: give at most one a sample"
            )
