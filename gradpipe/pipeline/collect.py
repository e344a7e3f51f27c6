"""Stage one: stream calibration samples once through a model, and write the gradient store."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gradpipe.errors import InputError
from gradpipe.pipeline.command import (
    changed_options,
    check_local,
    check_regexes,
    recorded_command,
)
from gradpipe.pipeline.output import holds
from gradpipe.pipeline.progress import QUIET, progress_bar
from gradpipe.stages.checkpoint import Checkpoint
from gradpipe.stages.device import resolve_device
from gradpipe.stages.model import (
    Layer,
    check_tokens,
    find_blocks,
    find_layers,
    load_model,
    load_tokenizer,
    sequence_length,
)
from gradpipe.stages.samples import DataConfig, Samples, draw_samples, load_text
from gradpipe.stages.schedule import resident_batch
from gradpipe.stages.statistics import LayerAccumulator
from gradpipe.store.codec import ENCODINGS
from gradpipe.store.gradients import GradientStore, StoreWriter, is_unfinished
from gradpipe.store.objects import COMMIT_KEY
from gradpipe.store.schema import (
    FORMAT_VERSION,
    STATISTICS,
    ModelSpec,
    StoreSpec,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectConfig:
    """What to collect, from what, into which store."""

    model: str  # directory, Hub id, or `embedded`
    store: Path  # a local folder to create
    data: DataConfig = field(default_factory=DataConfig)
    num_samples: int = 128
    seq_len: int | None = None  # tokens; default 2048, or the model's maximum where that is less
    seed: int = 0
    batch_size: int = 1
    statistics: tuple[str, ...] = ("grad_l1", "grad_l2", "act_l2")
    encoding: str = "compact"
    blocks: str | None = None  # path of the block list, where it cannot be found
    include: tuple[str, ...] = ()  # regexes: linear layers outside the blocks to collect too
    device: str = "auto"
    dtype: str = "auto"  # the checkpoint's own
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
        for name, least in (("num_samples", 1), ("batch_size", 1), ("seq_len", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} {value}: expected at least {least}")
        check_regexes("--include", self.include)


def collect(config: CollectConfig, console: Console = QUIET) -> GradientStore:
    """Run stage one, and return the finished store.

    Raises InputError before anything is written if the model, the data or the store's folder
    cannot be used; GradpipeError if the model yields NaN or the disk fails.
    """
    sources = (Path(config.model), Path(config.data.name))
    check_destination(config.store, overwrite=config.overwrite, sources=sources)
    device = resolve_device(config.device)
    checkpoint = Checkpoint.open(config.model)
    samples = _draw(config, checkpoint)
    model = load_model(checkpoint, config.dtype, device)
    check_tokens(samples.input_ids, checkpoint, model)
    blocks = find_blocks(model, config.blocks)
    layers = find_layers(model, blocks, checkpoint, config.include)
    spec = _store_spec(config, checkpoint, model, samples, layers)
    accumulators = [LayerAccumulator(x.spec, spec.statistics, device) for x in layers]
    ids = torch.from_numpy(samples.input_ids).long()
    with progress_bar(console, "collecting", len(ids), "samples", samples.spec.seq_len) as advance:
        for ids_BT in ids.split(config.batch_size):
            resident_batch(model, blocks, layers, accumulators, ids_BT.to(device))
            advance(len(ids_BT))
    _write(config, spec, samples, accumulators)
    return GradientStore.open(config.store)


def _draw(config: CollectConfig, checkpoint: Checkpoint) -> Samples:
    seq_len = sequence_length(config.seq_len, checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    text = load_text(config.data, "calibration")
    return draw_samples(config.data.name, text, tokenizer, config.num_samples, seq_len, config.seed)


def check_destination(folder: Path, *, overwrite: bool, sources: tuple[Path, ...]) -> None:
    """Raises InputError unless a store may be written to `folder`, which no source may lie in."""
    check_local("store", folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"store {folder} is a file, expected a folder to create")
    if not folder.exists() or not any(folder.iterdir()):
        return
    for source in sources:
        if source.exists() and holds(folder, source):
            raise InputError(f"store {folder} holds {source}, which is read: give another name")
    if is_unfinished(folder):
        return
    if not (folder / COMMIT_KEY).exists():  # anything but a store is never replaced
        raise InputError(f"store {folder} holds files of another kind: give another name")
    GradientStore.open(folder)
    if not overwrite:
        raise InputError(f"store {folder} exists and is complete: give another name or --overwrite")


def replace_store(folder: Path, spec: StoreSpec) -> StoreWriter:
    """A writer into `folder`, once what `check_destination` let pass is gone from it."""
    if folder.exists():
        shutil.rmtree(folder)
    writer = StoreWriter(folder, spec)
    writer.begin()
    return writer


def _store_spec(
    config: CollectConfig,
    checkpoint: Checkpoint,
    model: Any,
    samples: Samples,
    layers: tuple[Layer, ...],
) -> StoreSpec:
    options = changed_options(config, leave_out={"model", "store", "data", "overwrite", "device"})
    options |= {"dataset": config.data.name, "statistics": ",".join(config.statistics)}
    return StoreSpec(
        version=FORMAT_VERSION,
        gradpipe=version("gradpipe"),
        objective="causal-lm",
        model=ModelSpec(
            name=checkpoint.label,
            revision=checkpoint.revision,
            architecture=checkpoint.architecture,
            dtype=str(model.dtype).removeprefix("torch."),
            config_digest=checkpoint.config_digest,
        ),
        samples=samples.spec,
        statistics=tuple(name for name in STATISTICS if name in config.statistics),
        encoding=config.encoding,
        layers=tuple(layer.spec for layer in layers),
        command=recorded_command("collect-grads", (checkpoint.label, "STORE"), options),
    )


def _write(
    config: CollectConfig,
    spec: StoreSpec,
    samples: Samples,
    accumulators: list[LayerAccumulator],
) -> None:
    results = [accumulator.result() for accumulator in accumulators]  # every check comes first
    writer = replace_store(config.store, spec)
    writer.write_calibration(samples.input_ids, samples.sources)
    for accumulator, stats in zip(accumulators, results, strict=True):
        writer.write_layer(accumulator.spec, stats)
    writer.commit()
