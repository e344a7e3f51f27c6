"""Stage one: stream calibration samples once through a model, and write the gradient store."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console

from gradpipe.errors import InputError, Interrupted, StoreError
from gradpipe.pipeline.command import (
    changed_options,
    check_counts,
    check_regexes,
    recorded_command,
)
from gradpipe.pipeline.destination import check_scratch, check_store
from gradpipe.pipeline.merge import check_same, finalize, is_last
from gradpipe.pipeline.progress import QUIET
from gradpipe.pipeline.share import Job, begun_schedule, run_share
from gradpipe.stages.checkpoint import Checkpoint
from gradpipe.stages.device import resolve_device
from gradpipe.stages.experts import fused_weights
from gradpipe.stages.images import Processor, draw_images, load_images
from gradpipe.stages.inputs import image_tokens, share_hessians
from gradpipe.stages.model import (
    Skeleton,
    build_skeleton,
    check_tokens,
    dtype_name,
    find_blocks,
    find_layers,
    load_tokenizer,
    resolve_dtype,
    sequence_length,
    with_expected_tensors,
)
from gradpipe.stages.plan import Plan, Workload, check_schedule, make_plan
from gradpipe.stages.samples import DataConfig, draw_samples, load_text
from gradpipe.stages.tasks import check_loss_of_labels, check_task, find_task
from gradpipe.stages.tokens import is_tokens, token_samples, window_length
from gradpipe.store.codec import ENCODINGS
from gradpipe.store.gradients import (
    LOCK_NAME,
    PARTIAL,
    Calibration,
    GradientStore,
    StoreWriter,
    clear,
    is_begun,
    is_complete,
    read_begun,
    tidy,
)
from gradpipe.store.lock import locked
from gradpipe.store.partial import Partial, Shard, begun_shards
from gradpipe.store.schema import (
    CAUSAL_LM,
    DEFAULT_STATISTICS,
    FORMAT_VERSION,
    IMAGE_CLASSIFICATION,
    STATISTICS,
    SampleSpec,
    StoreSpec,
)


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


_MAX_TOKENS = 2**31  # of all samples: they are kept in memory, and in the store
_NOT_RESULTS = {  # fields that leave the store's content as it is
    *("model", "task", "store", "data", "overwrite", "device", "schedule", "scratch"),
    *("checkpoint_every", "shard", "finalize"),
}


def collect(config: CollectConfig, console: Console = QUIET) -> GradientStore:
    """Run stage one, and return the finished store; the same call again finishes a killed one.

    Raises InputError before anything is written if the model, the data or the store's folder
    cannot be used; GradpipeError if the model yields NaN or the disk fails; Interrupted on a
    signal. After the last two the store can be resumed.
    """
    if config.shard is not None:
        raise InputError("--shard: use collect_shard, which may leave the store unfinished")
    _run(config, Shard(0, 1), console)
    return GradientStore.open(config.store)


def collect_shard(config: CollectConfig, console: Console = QUIET) -> GradientStore | None:
    """Run one shard of stage one; returns the store if this finished it (`finalize`).

    Raises as `collect` does.
    """
    if config.shard is None:
        raise InputError("--shard: expected I/N, the job's number among N")
    _run(config, config.shard, console)
    if config.finalize and not is_complete(config.store):
        with locked(config.store / LOCK_NAME, of=config.store, wait=True):
            if not is_complete(config.store) and is_last(config.store):
                finalize(config.store)
    return GradientStore.open(config.store) if is_complete(config.store) else None


def plan(config: CollectConfig) -> Plan:
    """What stage one would take, from `config.json` alone: no weight is read, none is fetched."""
    checkpoint = with_expected_tensors(Checkpoint.outline(config.model))
    device, shard = resolve_device(config.device), config.shard or Shard(0, 1)
    skeleton = _skeleton(config, checkpoint, with_digests=False)
    if find_task(checkpoint) == IMAGE_CLASSIFICATION:
        check_loss_of_labels(skeleton.model)
        seq_len = image_tokens(skeleton.model, skeleton.blocks)
    else:
        seq_len = window_length(config.data.name, config.seq_len, checkpoint)
    return _plan(config, shard, skeleton, _workload(config, shard, seq_len), device)


def _run(config: CollectConfig, shard: Shard, console: Console) -> None:
    """Collect one share, and finish the store if it is all there is."""
    sources = (Path(config.model), Path(config.data.name))
    check_store(config.store, sources)
    if config.scratch is not None:
        check_scratch(config.scratch)
    checkpoint = Checkpoint.open(config.model)
    device = resolve_device(config.device)
    skeleton = _skeleton(config, checkpoint, with_digests=True)
    if fused := fused_weights(skeleton.model):
        console.print(
            f"{len(fused)} tensors hold several experts each, as {fused[0]} does: they are no "
            "layers, and stay dense",
            highlight=False,
            markup=False,
        )
    with ExitStack() as held:
        begun = _begin(config, shard, skeleton, held)
        if begun is None:
            return
        spec, calibration = begun
        work = _workload(config, shard, spec.samples.seq_len)
        job = Job(
            skeleton=skeleton,
            spec=spec,
            calibration=calibration,
            plan=_plan(config, shard, skeleton, work, device),
            device=device,
            store=config.store,
            shard=shard,
            batch_size=config.batch_size,
            scratch=config.scratch,
            checkpoint_every=config.checkpoint_every,
        )
        try:
            run_share(job, console)
        except Interrupted as error:
            again = ", without --overwrite," if config.overwrite else ""
            raise Interrupted(f"{error}: run the same command again{again} to go on") from error


def _plan(
    config: CollectConfig, shard: Shard, skeleton: Skeleton, work: Workload, device: torch.device
) -> Plan:
    """As `make_plan`, but `auto` goes on as was begun: another schedule would start anew."""
    begun = begun_schedule(config.store, shard) if config.schedule == "auto" else None
    planned = make_plan(begun or config.schedule, skeleton, work, device)
    return planned if begun is None else replace(planned, reason="as it was begun")


def _check_windows(config: CollectConfig, checkpoint: Checkpoint) -> None:
    """Raises InputError if the checkpoint is not for the task, or cannot have such windows."""
    if find_task(checkpoint, config.task) == CAUSAL_LM:
        sequence_length(config.seq_len, checkpoint)
    elif config.seq_len is not None:
        raise InputError(
            f"--seq-len {config.seq_len}: {checkpoint.name} classifies images, which have no "
            "windows: leave it out"
        )


def _skeleton(config: CollectConfig, checkpoint: Checkpoint, *, with_digests: bool) -> Skeleton:
    """The model taken apart; InputError if it cannot be, or is not for what is asked."""
    _check_windows(config, checkpoint)
    model = build_skeleton(checkpoint, resolve_dtype(config.dtype, checkpoint))
    blocks = find_blocks(model, config.blocks)
    layers = find_layers(model, blocks, checkpoint, config.include, with_digests=with_digests)
    if "hessian" in config.statistics:
        layers = share_hessians(model, layers)
    return Skeleton(checkpoint=checkpoint, model=model, blocks=blocks, layers=layers)


def _begin(
    config: CollectConfig, shard: Shard, skeleton: Skeleton, held: ExitStack
) -> tuple[StoreSpec, Calibration] | None:
    """Fix the samples, or find them fixed; None if the same command has finished before.

    The shard's lock, taken under the store's, is left with `held`.
    """
    folder, samples = config.store, None
    if is_complete(folder) and not config.overwrite:
        store = GradientStore.open(folder)
        if _spec(config, skeleton, store.spec.samples) != store.spec:
            raise InputError(
                f"store {folder} exists and is complete: give another name or --overwrite"
            )
        tidy(folder)
        return None
    if config.overwrite or not is_begun(folder):
        samples = _draw(config, skeleton)
    with locked(folder / LOCK_NAME, of=folder, wait=True):
        if is_complete(folder) and not config.overwrite:
            return None  # another process was faster
        if config.overwrite or not is_begun(folder):
            if not config.overwrite and begun_shards(folder):
                raise StoreError(
                    f"store {folder} holds shards, but the record of its samples has vanished: "
                    "restore partial/calibration.json, or start anew with --overwrite"
                )
            if samples is None:
                raise StoreError(f"store {folder} was removed meanwhile: run the command again")
            clear(folder)
            spec = _spec(config, skeleton, samples[0])
            StoreWriter(folder, spec).begin(samples[1])
        _check_count(folder, shard)
        spec, calibration = read_begun(folder)
        check_same(folder, _spec(config, skeleton, spec.samples), spec)
        held.enter_context(locked(Partial(folder, shard).lock, of=folder, wait=False))
        return spec, calibration


def _check_count(folder: Path, shard: Shard) -> None:
    """Raises InputError if shards of another number have been begun: they do not add up."""
    other = sorted(x.count for x in begun_shards(folder) if x.count != shard.count)
    for lock in (folder / PARTIAL).glob("*-of-*.lock"):
        if not lock.stem.endswith(f"-of-{shard.count}"):
            with locked(lock, of=folder, wait=False):
                pass  # or raise that it is at work
    if other:
        raise InputError(
            f"store {folder} was begun as {other[0]} shards, not {shard.count}: go on with "
            "that many, give another store or --overwrite"
        )


def _draw(config: CollectConfig, skeleton: Skeleton) -> tuple[SampleSpec, Calibration]:
    is_of_images = find_task(skeleton.checkpoint) == IMAGE_CLASSIFICATION
    spec, calibration = (_draw_images if is_of_images else _draw_windows)(config, skeleton)
    return replace(spec, dataset=config.data.label), calibration


def _draw_images(config: CollectConfig, skeleton: Skeleton) -> tuple[SampleSpec, Calibration]:
    model, checkpoint = skeleton.model, skeleton.checkpoint
    check_loss_of_labels(model)
    num_tokens = image_tokens(model, skeleton.blocks)
    processor = Processor(checkpoint, model)
    images = load_images(config.data, "calibration", checkpoint, model)
    return draw_images(images, processor, config.num_samples, num_tokens, config.seed)


def _draw_windows(config: CollectConfig, skeleton: Skeleton) -> tuple[SampleSpec, Calibration]:
    name, checkpoint = config.data.name, skeleton.checkpoint
    seq_len = window_length(name, config.seq_len, checkpoint)
    if config.num_samples * seq_len >= _MAX_TOKENS:
        raise InputError(
            f"--num-samples {config.num_samples} of {seq_len} tokens are "
            f"{config.num_samples * seq_len}, expected less than {_MAX_TOKENS}: ask for fewer"
        )
    if is_tokens(name):
        drawn = token_samples(name, config.num_samples, seq_len)
    else:
        tokenizer = load_tokenizer(checkpoint)
        text = load_text(config.data, "calibration")
        drawn = draw_samples(name, text, tokenizer, config.num_samples, seq_len, config.seed)
    check_tokens(drawn[1].arrays["input_ids"], checkpoint, skeleton.model)
    return drawn


def _workload(config: CollectConfig, shard: Shard, seq_len: int) -> Workload:
    return Workload(
        num_samples=len(shard.share(config.num_samples)),
        seq_len=seq_len,
        batch_size=config.batch_size,
        statistics=config.statistics,
        encoding=config.encoding,
    )


def _spec(config: CollectConfig, skeleton: Skeleton, samples: SampleSpec) -> StoreSpec:
    checkpoint = skeleton.checkpoint
    task = find_task(checkpoint)
    options = {"task": None if task == CAUSAL_LM else task}
    options |= changed_options(config, leave_out=_NOT_RESULTS)
    data = changed_options(config.data, leave_out={"name", "config"})
    options |= {"dataset": config.data.label, "dataset-config": config.data.config, **data}
    options |= {"statistics": ",".join(config.statistics)}
    return StoreSpec(
        version=FORMAT_VERSION,
        gradpipe=version("gradpipe"),
        objective=task,
        model=checkpoint.model_spec(dtype_name(skeleton.model.dtype)),
        samples=samples,
        statistics=tuple(name for name in STATISTICS if name in config.statistics),
        encoding=config.encoding,
        layers=tuple(layer.spec for layer in skeleton.layers),
        command=recorded_command("collect-grads", (checkpoint.label, "STORE"), options),
    )
