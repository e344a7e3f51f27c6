"""Turn the reference implementation's gradient files into a store for a given checkpoint."""

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from gradpipe.errors import InputError
from gradpipe.options import recorded_command, recorded_options
from gradpipe.pipeline.collect.config import ImportConfig
from gradpipe.pipeline.places import check_store
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.checkpoint.gblm_files import match_layers, read_gblm_file
from gradpipe.stages.model.tasks import find_task
from gradpipe.store.folder import LOCK_NAME, clear, is_begun, is_complete
from gradpipe.store.lock import locked
from gradpipe.store.reader import GradientStore
from gradpipe.store.schema import FORMAT_VERSION, LayerSpec, SampleSpec, StoreSpec
from gradpipe.store.statistics import STATISTICS, LayerStats, Sums, is_of_activations
from gradpipe.store.writer import StoreWriter


def import_gblm(config: ImportConfig) -> GradientStore:
    """Make a store of the gradient files that GBLM-Pruner's own code writes.

    Args:
        config: The checkpoint, its files of ℓ1 and ℓ2 norms, and what they were summed over.

    Returns:
        The finished store, with activation norms where another store was given for them.

    Raises:
        InputError: If files and checkpoint do not fit together, before anything is written.

    Example:
        >>> from pathlib import Path
        >>> from gradpipe import ImportConfig, import_gblm
        >>> config = ImportConfig(
        ...     model="llama-2-7b", store=Path("store"), l1=Path("gradients_l1.pth")
        ... )
        >>> store = import_gblm(config)  # doctest: +SKIP

    """
    activations = None if config.activations is None else GradientStore.open(config.activations)
    taken_from = None if activations is None else activations.local_folder
    sources = (config.l1, config.l2, Path(config.model), taken_from)
    check_store(config.store, tuple(source for source in sources if source is not None))
    _check_replaceable(config)
    checkpoint = Checkpoint.open(config.model)
    sums = _read_files(config)
    keys = set.union(*(set(arrays) for arrays in sums.values()))
    layers = match_layers(keys, checkpoint)
    _check_files(sums, layers)
    taken = () if activations is None else _taken(activations, layers)
    if activations is not None:
        activations.verify()  # before anything is removed for what would stop halfway
    spec = _spec(config, checkpoint, layers, (*sums, *taken))
    with locked(config.store / LOCK_NAME, of=config.store, wait=False):
        _check_replaceable(config)  # another process may have been faster
        clear(config.store)
        writer = StoreWriter(config.store, spec)
        writer.begin(None)
        for key, layer in sorted(layers.items(), key=lambda item: (item[1].block, item[0])):
            gradients = {statistic: arrays[key] for statistic, arrays in sums.items()}
            writer.write_layer(
                layer, LayerStats(arrays=gradients, num_samples=config.num_samples, num_tokens=0)
            )
            if activations is not None:
                writer.write_encoded(layer, activations.read(layer, taken))
        writer.commit()
    return GradientStore.open(config.store)


def _check_replaceable(config: ImportConfig) -> None:
    """InputError for a store, finished or begun, unless it may be overwritten."""
    state = "is complete" if is_complete(config.store) else "was begun by collect-grads"
    if (is_complete(config.store) or is_begun(config.store)) and not config.overwrite:
        raise InputError(
            f"store {config.store} exists and {state}: give another name or --overwrite"
        )


def _read_files(config: ImportConfig) -> dict[str, dict[str, Sums]]:
    given = {"l1": config.l1, "l2": config.l2}
    files = {name: given.get(x.gblm_file or "") for name, x in STATISTICS.items()}
    return {
        statistic: read_gblm_file(path, statistic, config.scale)
        for statistic, path in files.items()
        if path is not None
    }


def _check_files(sums: dict[str, dict[str, Sums]], layers: dict[str, LayerSpec]) -> None:
    for statistic, arrays in sums.items():
        for key, layer in layers.items():
            if key not in arrays:
                raise InputError(
                    f"the {statistic} file lacks {key}, which the other one has: compute it again"
                )
            if arrays[key].shape != layer.shape:
                raise InputError(
                    f"{key} is {arrays[key].shape}, {layer.name} is {layer.shape}: "
                    "give the model that the file was computed from"
                )


def _taken(activations: GradientStore, layers: dict[str, LayerSpec]) -> tuple[str, ...]:
    """The activation statistics to take, once the store is known to be of the same weights."""
    taken = tuple(filter(is_of_activations, activations.spec.statistics))
    if not taken:
        raise InputError(
            f"store {activations.url} holds no activations: collect with --statistics act_l2"
        )
    for layer in layers.values():
        theirs = activations.spec.layer(layer.name)
        if theirs is None or replace(theirs, input_of=None) != layer:
            raise InputError(
                f"store {activations.url} is not of the same weights: {layer.name} differs"
            )
    return taken


def _spec(
    config: ImportConfig,
    checkpoint: Checkpoint,
    layers: dict[str, LayerSpec],
    statistics: tuple[str, ...],
) -> StoreSpec:
    return StoreSpec(
        version=FORMAT_VERSION,
        gradpipe=version("gradpipe"),
        objective=find_task(checkpoint),
        model=checkpoint.model_spec("float16"),
        samples=SampleSpec(
            dataset="GBLM-Pruner",
            revision=None,
            sampling="imported",
            seed=0,
            num_samples=config.num_samples,
            seq_len=0,
            digest="",
        ),
        statistics=statistics,
        encoding="float32",
        layers=tuple(sorted(layers.values(), key=lambda layer: (layer.block or 0, layer.name))),
        command=recorded_command(
            "store import-gblm", (checkpoint.label, "STORE"), recorded_options(config)
        ),
    )
