"""Stage one: stream calibration samples once through a model, and write the gradient store."""

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from gradpipe.errors import InputError, Interrupted
from gradpipe.pipeline.collect.begin import begin, with_digests_of
from gradpipe.pipeline.collect.config import CollectConfig
from gradpipe.pipeline.collect.merge import finalize, is_last
from gradpipe.pipeline.collect.resume import Place, share_of
from gradpipe.pipeline.collect.worker import Job, begun_schedule, run_part
from gradpipe.pipeline.launch import Launch
from gradpipe.pipeline.places import check_scratch, check_store
from gradpipe.pipeline.progress import QUIET, tell
from gradpipe.pipeline.ranks import Ranks, common_facts, joined
from gradpipe.pipeline.reports.results import ModelReport
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.collect.estimate import Estimate, Workload, estimate, spread
from gradpipe.stages.collect.placement import Placement, place
from gradpipe.stages.collect.probe import probe
from gradpipe.stages.collect.schedule import check_shared
from gradpipe.stages.data.tokens import window_length
from gradpipe.stages.device import own_torch, resolve_device, torch_threads, usable_threads
from gradpipe.stages.model.couplings import find_couplings
from gradpipe.stages.model.layers import dense_lines
from gradpipe.stages.model.load import (
    dtype_name,
    resolve_dtype,
    sequence_length,
    with_expected_tensors,
)
from gradpipe.stages.model.skeleton import Skeleton, take_apart
from gradpipe.stages.model.tasks import check_loss_of_labels, find_task
from gradpipe.store.folder import LOCK_NAME, is_begun, is_complete
from gradpipe.store.lock import locked
from gradpipe.store.reader import GradientStore
from gradpipe.store.schema import CAUSAL_LM, IMAGE_CLASSIFICATION


def collect(config: CollectConfig, console: Console = QUIET) -> GradientStore:
    """Run stage one: the gradients of calibration samples, collected into a store.

    The same call again finishes one that was killed, with the same bytes.

    Args:
        config: The model, the samples, the statistics and the store's folder.
        console: Where progress and warnings are shown; nowhere by default.

    Returns:
        The finished store, open to be read.

    Raises:
        InputError: Before anything is written, if model, data or folder cannot be used.
        GradpipeError: If the model yields NaN or the disk fails; the store can be resumed.
        Interrupted: On a signal; the store can be resumed.

    Example:
        >>> from pathlib import Path
        >>> from gradpipe import CollectConfig, DataConfig, collect
        >>> text = DataConfig(name="stdlib")
        >>> store = collect(
        ...     CollectConfig(
        ...         model="embedded", store=Path("store"), data=text, num_samples=4, seq_len=32
        ...     )
        ... )
        >>> layer = store.spec.layers[0]
        >>> layer.name, store.read_norms(layer, "grad_l1").shape
        ('model.layers.0.self_attn.q_proj', (128, 128))

    """
    if config.shard is not None:
        raise InputError("--shard: use collect_shard, which may leave the store unfinished")
    _run(config, console)
    return GradientStore.open(config.store)


def collect_shard(config: CollectConfig, console: Console = QUIET) -> GradientStore | None:
    """Run one shard of stage one: job I of N, each with its own share of the samples.

    The jobs may run at once, over one shared folder; `merge` adds them up, or the last one does if
    `finalize` is asked for. The store is the same, bit for bit, as one run's over all samples
    added up in the shards' order.

    Args:
        config: As for `collect`, with a `shard`.
        console: Where progress and warnings are shown; nowhere by default.

    Returns:
        The store if this job finished it, else None.

    Raises:
        InputError: Also without a `shard`; GradpipeError and Interrupted as `collect` does.

    Example:
        >>> from pathlib import Path
        >>> from gradpipe import CollectConfig, DataConfig, Shard, collect_shard
        >>> for index in (0, 1):
        ...     config = CollectConfig(
        ...         model="embedded",
        ...         store=Path("shared"),
        ...         data=DataConfig(name="stdlib"),
        ...         num_samples=4,
        ...         seq_len=32,
        ...         shard=Shard(index, 2),
        ...         finalize=True,
        ...     )
        ...     finished = collect_shard(config)
        ...     print(index, finished is not None)
        0 False
        1 True

    """
    if config.shard is None:
        raise InputError("--shard: expected I/N, the job's number among N")
    _run(config, console)
    if config.finalize and not is_complete(config.store):
        with locked(config.store / LOCK_NAME, of=config.store, wait=True):
            if not is_complete(config.store) and is_last(config.store):
                finalize(config.store)
    return GradientStore.open(config.store) if is_complete(config.store) else None


def plan(config: CollectConfig) -> Estimate:
    """What stage one would take, from `config.json` alone: no weight is read, none is fetched.

    Args:
        config: As for `collect`; its folder need not be writable.

    Returns:
        Memory, disk and operations in bytes and counts, and which schedule `auto` would choose.

    Raises:
        InputError: For a model that cannot be collected, as far as its config tells.

    Example:
        >>> from pathlib import Path
        >>> from gradpipe import CollectConfig, plan
        >>> estimate = plan(CollectConfig(model="embedded", store=Path("store"), seq_len=32))
        >>> estimate.schedule
        'resident'

    """
    return examine(config).estimate


@own_torch()
def examine(config: CollectConfig) -> ModelReport:
    """What stage one would make of a model, and take: as `plan`.

    Raises InputError for a model that cannot be collected, as far as its config tells.
    """
    checkpoint = with_expected_tensors(Checkpoint.outline(config.model))
    device = resolve_device(config.device)
    skeleton = _skeleton(config, checkpoint, with_couplings=False)
    placement = _placed(config, skeleton, Launch.of(os.environ))
    if find_task(checkpoint) == IMAGE_CLASSIFICATION:
        seq_len = skeleton.image_tokens()
    else:
        seq_len = window_length(config.data.name, config.seq_len, checkpoint)
    return ModelReport(
        name=checkpoint.name,
        architecture=checkpoint.architecture,
        task=find_task(checkpoint),
        dtype=dtype_name(skeleton.model.dtype),
        blocks=skeleton.blocks.path,
        num_blocks=skeleton.blocks.count,
        num_layers=len(skeleton.layers),
        num_layer_weights=sum(x.spec.num_weights for x in skeleton.layers),
        dense=tuple(dense_lines(skeleton.left_out)),
        estimate=_plan(config, Ranks(), skeleton, seq_len, placement or device),
    )


def _run(config: CollectConfig, console: Console) -> None:
    """Collect one shard's part, with all ranks, and finish the store if it is all there is."""
    launch = Launch.of(os.environ)
    if launch.is_restart:  # what the first start overwrote is gone; this one goes on
        config = replace(config, overwrite=False)
    with joined(config.rank_timeout) as ranks, own_torch():
        if not ranks.is_first:
            console = QUIET
        try:
            _run_ranks(config, ranks, launch, console)
        except Interrupted as error:
            again = ", without --overwrite," if config.overwrite else ""
            raise Interrupted(f"{error}: run the same command again{again} to go on") from error


def _run_ranks(config: CollectConfig, ranks: Ranks, launch: Launch, console: Console) -> None:
    """What each rank does, in step with the others."""
    ranks.first(lambda: _check_places(config, ranks))
    checkpoint = ranks.together(lambda: Checkpoint.open(config.model))
    ranks.agree(common_facts(config, checkpoint))
    device, skeleton = ranks.together(lambda: _prepared(config, checkpoint, launch))
    for line in dense_lines(skeleton.left_out):
        tell(console, line)
    placement = ranks.together(lambda: _placed(config, skeleton, launch))
    if ranks.first(lambda: config.overwrite or not is_begun(config.store)):
        ranks.first(lambda: probe(skeleton, device))  # before the first of the work
    with ExitStack() as held, torch_threads(usable_threads()):
        begun = begin(config, ranks, skeleton, held, console)
        if begun is None:
            return
        spec, calibration = begun
        place = Place(
            store=config.store, spec=spec, calibration=calibration, shard=config.job, ranks=ranks
        )
        job = Job(
            place=place,
            skeleton=with_digests_of(skeleton, spec),
            plan=_plan(config, ranks, skeleton, spec.samples.seq_len, device),
            device=device,
            placement=placement,
            config=config,
        )
        run_part(job, console)


def _check_places(config: CollectConfig, ranks: Ranks) -> None:
    """Raises InputError if the store may not be written, or not by so many ranks."""
    check_store(config.store, (Path(config.model), Path(config.data.name)))
    shard = config.job
    if ranks.count > 1 and shard.count > 1:
        raise InputError(
            f"--shard {shard.index}/{shard.count}: the {ranks.count} ranks share the samples out: "
            "leave it out; in a Slurm array that is about something else, give --shard 0/1"
        )
    if ranks.count > config.num_samples:
        raise InputError(
            f"{ranks.count} ranks: more than the {config.num_samples} samples: start at most one a "
            "sample"
        )


def _prepared(
    config: CollectConfig, checkpoint: Checkpoint, launch: Launch
) -> tuple[torch.device, Skeleton]:
    """Where this process computes, and the model taken apart; InputError if it cannot be."""
    if config.scratch is not None:
        check_scratch(config.scratch)
    device = resolve_device(launch.device(config.device, torch.cuda.device_count()))
    return device, _skeleton(config, checkpoint, with_couplings=True)


def _placed(config: CollectConfig, skeleton: Skeleton, launch: Launch) -> Placement | None:
    """Where a resident model is spread to, if it is; InputError for ranks of one host."""
    if config.device_map is None:
        return None
    if launch.local_count > 1 or launch.local_index:
        raise InputError(
            f"--device-map {config.device_map}: it takes all GPUs of a host, and each rank has "
            "one: start one rank on each host, or leave it out"
        )
    return place(skeleton, config.device_map, config.statistics)


def _plan(
    config: CollectConfig,
    ranks: Ranks,
    skeleton: Skeleton,
    seq_len: int,
    where: torch.device | Placement,
) -> Estimate:
    """As `estimate`; `auto` goes on as was begun, as another schedule would start anew.

    All ranks run the same schedule: resident where that fits on each.
    """
    work = Workload(
        num_samples=len(share_of(config.job, ranks).part_of(config.num_samples)),
        seq_len=seq_len,
        batch_size=config.batch_size,
        statistics=config.statistics,
        encoding=config.encoding,
    )
    device = where.main if isinstance(where, Placement) else where
    begun = None
    if config.schedule == "auto":
        found = set(ranks.gathered(begun_schedule(config.store, config.job, ranks)))
        begun = next((x for x in ("resident", "streamed") if x in found), None)
    has_own_gpu = device.type == "cuda" and config.device in {"auto", "cuda"}
    sharing = 1 if ranks.count == 1 or has_own_gpu else Launch.of(os.environ).local_count
    planned = estimate(begun or config.schedule, skeleton, work, device, sharing)
    if isinstance(where, Placement):
        return spread(planned, skeleton, work, where.of)
    if begun is not None:
        return replace(planned, reason="as it was begun")
    if "streamed" in ranks.gathered(planned.schedule) and planned.schedule == "resident":
        return replace(planned, schedule="streamed", reason="resident does not fit all ranks")
    return planned


def _check_windows(config: CollectConfig, checkpoint: Checkpoint) -> None:
    """Raises InputError if the checkpoint is not for the task, or cannot have such windows."""
    if find_task(checkpoint, config.task) == CAUSAL_LM:
        sequence_length(config.seq_len, checkpoint)
    elif config.seq_len is not None:
        raise InputError(
            f"--seq-len {config.seq_len}: {checkpoint.name} classifies images, which have no "
            "windows: leave it out"
        )


def _skeleton(config: CollectConfig, checkpoint: Checkpoint, *, with_couplings: bool) -> Skeleton:
    """The model taken apart; InputError if it cannot be, or is not for what is asked."""
    _check_windows(config, checkpoint)
    dtype = resolve_dtype(config.dtype, checkpoint)
    found = take_apart(checkpoint, dtype, config.blocks, config.include, config.exclude)
    if find_task(checkpoint) == IMAGE_CLASSIFICATION:
        check_loss_of_labels(found.model)
        found.image_tokens()  # or it refuses
    check_shared(found)
    if not with_couplings:
        return found
    return replace(found, couplings=find_couplings(found.model, found.blocks, found.layers))
