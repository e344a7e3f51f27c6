"""The begin of a collection: fix its samples, or find them fixed; refuse another collection."""

from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from gradpipe.errors import InputError, StoreError
from gradpipe.options import recorded_command, recorded_options
from gradpipe.pipeline.collect.config import CollectConfig
from gradpipe.pipeline.collect.merge import check_same
from gradpipe.pipeline.collect.resume import parts_in, share_of
from gradpipe.pipeline.progress import counted, progress_bar
from gradpipe.pipeline.ranks import Ranks
from gradpipe.stages.data.images import Processor, draw_images, load_images
from gradpipe.stages.data.samples import Samples
from gradpipe.stages.data.text import load_text
from gradpipe.stages.data.tokens import is_tokens, token_samples, window_length
from gradpipe.stages.data.windows import draw_samples
from gradpipe.stages.model.layers import measured
from gradpipe.stages.model.load import check_tokens, dtype_name, load_tokenizer
from gradpipe.stages.model.skeleton import Skeleton
from gradpipe.stages.model.tasks import find_task
from gradpipe.store.folder import (
    LOCK_NAME,
    PARTIAL,
    Calibration,
    clear,
    is_begun,
    is_complete,
    read_begun,
    tidy,
)
from gradpipe.store.lock import locked
from gradpipe.store.reader import GradientStore
from gradpipe.store.schema import (
    CAUSAL_LM,
    FORMAT_VERSION,
    IMAGE_CLASSIFICATION,
    SampleSpec,
    StoreSpec,
)
from gradpipe.store.shard import Shard
from gradpipe.store.snapshots import Snapshots, begun_shards
from gradpipe.store.statistics import in_order
from gradpipe.store.writer import StoreWriter

_MAX_TOKENS = 2**31  # of all samples: they are kept in memory, and in the store


def begin(
    config: CollectConfig, ranks: Ranks, skeleton: Skeleton, held: ExitStack, console: Console
) -> tuple[StoreSpec, Calibration] | None:
    """Fix the samples, or find them fixed; None if the same command has finished before.

    The lock of this process's share, taken under the store's, is left with `held`. Whoever fixes
    the samples reads all weights once, for their digests; everyone checks those of the weights that
    it loads. Of several ranks the first does this, and the others find it done.
    """
    share, found = share_of(config.job, ranks), None

    def fix() -> bool:
        nonlocal found
        found = _begin(config, share, skeleton, held, console)
        return found is not None

    if not ranks.first(fix):
        return None
    if ranks.count > 1:
        ranks.together(lambda: None if found else _join(config, share, skeleton, held))
    return found or read_begun(config.store)


def _begin(
    config: CollectConfig, shard: Shard, skeleton: Skeleton, held: ExitStack, console: Console
) -> tuple[StoreSpec, Calibration] | None:
    folder = config.store
    if _is_finished(config, skeleton):
        return None
    drawn = None if _is_to_go_on(config) else _draw(config, skeleton, console)
    with locked(folder / LOCK_NAME, of=folder, wait=True):
        if _is_finished(config, skeleton):
            return None  # another process was faster
        if not _is_to_go_on(config):
            if drawn is None:
                raise StoreError(f"store {folder} was removed meanwhile: run the command again")
            clear(folder)
            found = skeleton.layers
            read = counted(found, console, "reading weights", len(found), "layers")
            layers = measured(read, skeleton.checkpoint)
            spec = _spec(config, replace(skeleton, layers=layers), drawn[0])
            StoreWriter(folder, spec).begin(drawn[1])
        return _take(config, shard, skeleton, held)


def _is_to_go_on(config: CollectConfig) -> bool:
    """Whether samples are fixed; StoreError if shards lie there without the samples they are of."""
    if config.overwrite or is_begun(config.store):
        return not config.overwrite
    if begun_shards(config.store):
        raise StoreError(
            f"store {config.store} holds shards, but the record of its samples has vanished: "
            "restore partial/calibration.json, or start anew with --overwrite"
        )
    return False


def _join(config: CollectConfig, shard: Shard, skeleton: Skeleton, held: ExitStack) -> None:
    """Take a rank's share of what the first has begun; InputError if this is another folder."""
    with locked(config.store / LOCK_NAME, of=config.store, wait=True):
        if not is_begun(config.store):
            raise InputError(
                f"store {config.store} is not there, which rank 0 has begun: expected a folder "
                "that all hosts share"
            )
        _take(config, shard, skeleton, held)


def _take(
    config: CollectConfig, shard: Shard, skeleton: Skeleton, held: ExitStack
) -> tuple[StoreSpec, Calibration]:
    """A share of a begun store, whose lock the caller has, and the share's lock."""
    folder = config.store
    _check_count(folder, shard, may_be_blocks=config.shard is None)
    spec, calibration = read_begun(folder)
    check_same(folder, _expected(config, skeleton, spec), spec)
    held.enter_context(locked(Snapshots(folder, shard).lock, of=folder, wait=False))
    return spec, calibration


def _is_finished(config: CollectConfig, skeleton: Skeleton) -> bool:
    """Whether this command's store is complete; InputError if another command's is there."""
    if config.overwrite or not is_complete(config.store):
        return False
    spec = GradientStore.open(config.store).spec
    if _expected(config, skeleton, spec) == spec:
        layers = measured(skeleton.layers, skeleton.checkpoint)
        if _spec(config, replace(skeleton, layers=layers), spec.samples) == spec:
            tidy(config.store)
            return True
    raise InputError(
        f"store {config.store} exists and is complete: give another name or --overwrite"
    )


def _expected(config: CollectConfig, skeleton: Skeleton, spec: StoreSpec) -> StoreSpec:
    """What this command would make of the same samples, and of weights of the same digests."""
    return _spec(config, with_digests_of(skeleton, spec), spec.samples)


def with_digests_of(skeleton: Skeleton, spec: StoreSpec) -> Skeleton:
    """The skeleton with its layers' digests as in a spec; zeros for one that it lacks."""
    digests = {layer.name: layer.digest for layer in spec.layers}
    layers = (
        replace(x, spec=replace(x.spec, digest=digests.get(x.spec.name, "0" * 32)))
        for x in skeleton.layers
    )
    return replace(skeleton, layers=tuple(layers))


def _check_count(folder: Path, shard: Shard, *, may_be_blocks: bool) -> None:
    """Raises InputError if shards, or ranks, of another number have been begun.

    Their sums do not add up with these. Ranks go on from blocks, which are all ranks' together.
    """
    whole = parts_in(Snapshots(folder, Shard(0, 1))).values()
    is_of_blocks = may_be_blocks and not any(part.is_cumulative for part in whole)
    ours = {shard.count, 1} if is_of_blocks else {shard.count}
    other = sorted(x.count for x in begun_shards(folder) if x.count not in ours)
    for lock in (folder / PARTIAL).glob("*-of-*.lock"):
        if not lock.stem.endswith(f"-of-{shard.count}"):
            with locked(lock, of=folder, wait=False):
                pass  # or raise that it is at work
    if other:
        raise InputError(
            f"store {folder} was begun as {other[0]} shards or ranks, not {shard.count}: go on "
            "with that many, give another store or --overwrite"
        )


def _draw(config: CollectConfig, skeleton: Skeleton, console: Console) -> Samples:
    is_of_images = find_task(skeleton.checkpoint) == IMAGE_CLASSIFICATION
    draw = _draw_images if is_of_images else _draw_windows
    spec, calibration = draw(config, skeleton, console)
    return Samples(replace(spec, dataset=config.data.label), calibration)


def _draw_images(config: CollectConfig, skeleton: Skeleton, console: Console) -> Samples:
    model, checkpoint = skeleton.model, skeleton.checkpoint
    num_tokens = skeleton.image_tokens()
    processor = Processor(checkpoint, model)
    images = load_images(config.data, "calibration", checkpoint, model)
    count = config.num_samples
    with progress_bar(console, "drawing", count, "images") as advance:
        return draw_images(images, processor, count, num_tokens, config.seed, advance)


def _draw_windows(config: CollectConfig, skeleton: Skeleton, console: Console) -> Samples:
    name, checkpoint, count = config.data.name, skeleton.checkpoint, config.num_samples
    seq_len = window_length(name, config.seq_len, checkpoint)
    if count * seq_len >= _MAX_TOKENS:
        raise InputError(
            f"--num-samples {count} of {seq_len} tokens are {count * seq_len}, expected less than "
            f"{_MAX_TOKENS}: ask for fewer"
        )
    if is_tokens(name):
        drawn = token_samples(name, count, seq_len)
    else:
        tokenizer = load_tokenizer(checkpoint)
        text = load_text(config.data, "calibration", tokenizer)
        with progress_bar(console, "drawing", count, "samples", seq_len) as advance:
            drawn = draw_samples(name, text, tokenizer, count, seq_len, config.seed, advance)
    check_tokens(drawn.calibration.arrays["input_ids"], checkpoint, skeleton.model)
    return drawn


def _spec(config: CollectConfig, skeleton: Skeleton, samples: SampleSpec) -> StoreSpec:
    checkpoint = skeleton.checkpoint
    task = find_task(checkpoint)
    options = {"--task": None if task == CAUSAL_LM else task}
    options |= recorded_options(config)
    options |= {"--dataset": config.data.label, "--dataset-config": config.data.config}
    options |= recorded_options(config.data)
    options |= {"--statistics": ",".join(config.statistics)}
    return StoreSpec(
        version=FORMAT_VERSION,
        gradpipe=version("gradpipe"),
        objective=task,
        model=checkpoint.model_spec(dtype_name(skeleton.model.dtype)),
        samples=samples,
        statistics=in_order(config.statistics),
        encoding=config.encoding,
        layers=tuple(layer.spec for layer in skeleton.layers),
        couplings=skeleton.couplings,
        command=recorded_command("collect-grads", (checkpoint.label, "STORE"), options),
    )
