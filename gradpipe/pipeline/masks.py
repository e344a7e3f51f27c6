"""Masks on their own: taken from a pruned checkpoint, and put on a fine-tuned one.

Applying rewrites files as pruning does: byte for byte but for the zeros, beside OUT, then renamed.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from gradpipe.errors import ODD_DOCUMENT, GradpipeError, InputError
from gradpipe.options import recorded_command
from gradpipe.pipeline.places import check_local, check_out
from gradpipe.pipeline.progress import QUIET, progress_bar
from gradpipe.pipeline.prune.outcome import copy_companions
from gradpipe.pipeline.prune.staging import Staging
from gradpipe.pipeline.reports.card import write_report
from gradpipe.pipeline.reports.recorded import Recorded
from gradpipe.pipeline.reports.results import (
    LayerResult,
    PruneOrder,
    PruneReport,
    PruneResult,
    Zeros,
)
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.checkpoint.layer_names import find_layer, list_of
from gradpipe.stages.checkpoint.mask_file import MaskFile, write_masks
from gradpipe.stages.checkpoint.rewrite import rewriting
from gradpipe.stages.checkpoint.tensors import FLOAT_TYPES, TensorInfo, as_tensor, count_zeros
from gradpipe.store.objects import digest

METHOD = "mask"  # in `pruning.json`: zeros by a file, all other weights as they were


def export_masks(model: str, file: str | Path) -> int:
    """Write where the layers of a pruned checkpoint are not zero: one bit a weight.

    Args:
        model: A folder that `prune` or `apply_masks` wrote.
        file: The safetensors file to create.

    Returns:
        How many layers the masks are of.

    Raises:
        InputError: If the checkpoint or its record cannot be read, or the file exists.
        GradpipeError: If the disk fails; the file is then not there.

    Example:
        >>> from pathlib import Path
        >>> from gradpipe import PruneConfig, export_masks, prune
        >>> pruned = prune(PruneConfig(model="embedded", store="store", out=Path("exported")))
        >>> export_masks("exported", Path("exported.safetensors"))
        28
    """
    path = Path(file)
    check_local("masks", path)
    if path.exists() or not path.parent.is_dir():
        raise InputError(f"masks {file}: expected a new file, in a folder that exists")
    checkpoint = Checkpoint.open(model)
    recorded = Recorded.read(checkpoint.folder)
    places = _places(recorded, checkpoint)
    try:
        write_masks(path, checkpoint, places.values(), dict(recorded.document))
    except OSError as error:
        raise GradpipeError(
            f"cannot write masks {file}: {error.strerror or error}: make room, or give another name"
        ) from error
    return len(places)


def apply_masks(
    model: str,
    masks: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    console: Console = QUIET,
) -> PruneResult:
    """Give a fine-tuned checkpoint the zeros of a pruned one. On any error nothing is left behind.

    Args:
        model: The checkpoint; its tensors have the names and shapes of the pruned one's.
        masks: What `export_masks` wrote.
        out: The folder to create.
        overwrite: Whether `out` may be replaced, if it is a pruned checkpoint.
        console: Where progress is shown; nowhere by default.

    Returns:
        The written checkpoint, read back.

    Raises:
        InputError: If checkpoint and masks are not of one model, or `out` may not be written.
        GradpipeError: If the disk fails.

    Example:
        >>> from pathlib import Path
        >>> from gradpipe import PruneConfig, apply_masks, export_masks, prune
        >>> pruned = prune(PruneConfig(model="embedded", store="store", out=Path("masked")))
        >>> layers = export_masks("masked", Path("masks.safetensors"))
        >>> apply_masks("embedded", Path("masks.safetensors"), Path("masked-again")).achieved
        0.5
    """
    checkpoint, file = Checkpoint.open(model), MaskFile.open(Path(masks))
    folder = Path(out)
    recorded, order = _understood(checkpoint, file)
    _check_fit(checkpoint, file)
    _places(recorded, checkpoint)  # or it refuses
    sources = (checkpoint.folder, file.path)
    staging = Staging(folder, lambda: check_out(folder, overwrite=overwrite, sources=sources))
    staging.check()
    with staging.begun():
        with progress_bar(console, "applying masks", len(file.shapes), "tensors") as advance:
            written = _write(checkpoint, file, staging.folder, advance)
        copy_companions(checkpoint, staging.folder)
        report = _report(order, recorded, staging.folder, written)
        write_report(staging.folder, report)
        staging.publish()
    return PruneResult(folder=folder, label=folder.name, report=report)


def _places(recorded: Recorded, checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """Where each recorded layer lies; InputError if one does not."""
    places = {}
    for name, layer in recorded.layers.items():
        place = find_layer(checkpoint, name, layer.size)
        if place is None:
            raise InputError(
                f"{checkpoint.name} has no layer {name} of {layer.size} weights, as the record of "
                "its pruning says: give a checkpoint of the model that was pruned"
            )
        places[name] = place
    return places


def _understood(checkpoint: Checkpoint, file: MaskFile) -> tuple[Recorded, PruneOrder]:
    """The record among the masks, and what that of a checkpoint with them will say."""
    try:
        recorded = Recorded.of(file.report)
        return recorded, _order(checkpoint, file.path, recorded.document)
    except ODD_DOCUMENT as error:
        raise InputError(
            f"{file.path}: its report is no pruning.json: export the masks again"
        ) from error


def _order(checkpoint: Checkpoint, masks: Path, was: Mapping[str, Any]) -> PruneOrder:
    """As recorded where it is of the zeros; the weights are this checkpoint's own."""
    return PruneOrder(
        gradpipe=version("gradpipe"),
        model=checkpoint.label,
        revision=checkpoint.revision,
        store=str(was["store"]),
        method=METHOD,
        score=None,
        update="none",
        curvature=str(was["curvature"]),
        allocation=str(was["allocation"]),
        statistics=(),
        alpha=float(was["alpha"]),
        grad_norm=str(was["grad_norm"]),
        group=str(was["group"]),
        pattern=str(was["pattern"]),
        command=recorded_command("mask apply", (checkpoint.label, masks.name, "OUT"), {}),
    )


def _check_fit(checkpoint: Checkpoint, file: MaskFile) -> None:
    """Raises InputError unless each mask is of a tensor of floats, of its shape."""
    for key, shape in file.shapes.items():
        info = checkpoint.tensors.get(key)
        if info is None or info.shape != shape or info.dtype not in FLOAT_TYPES:
            found = "none" if info is None else f"{info.dtype} {info.shape}"
            raise InputError(
                f"{checkpoint.name}: {key} is {found}, and {file.path} has a mask of {shape}: give "
                "a checkpoint of the model that was pruned"
            )


def _write(
    checkpoint: Checkpoint, file: MaskFile, folder: Path, advance: Callable[[int], None]
) -> dict[str, str]:
    """Write every file; the digests of the tensors that have masks."""
    digests = {}
    infos = [checkpoint.tensors[key] for key in file.shapes]
    for name in checkpoint.files:
        places = [info for info in infos if info.file == name]
        with rewriting(checkpoint.folder / name, [folder / name], places) as rewritten:
            for place in places:
                tensor, mask = checkpoint.read(place.key), file.read(place.key)
                [digests[place.key]] = rewritten.replace(place, [tensor.masked_fill(~mask, 0)])
                advance(1)
            rewritten.copy_rest()
    return digests


def _report(
    order: PruneOrder, recorded: Recorded, folder: Path, written: Mapping[str, str]
) -> PruneReport:
    """What the written files hold, read back."""
    out = Checkpoint.open(str(folder))
    layers, by_key = dict[str, LayerResult](), dict[str, list[tuple[str, TensorInfo]]]()
    for name, place in _places(recorded, out).items():
        by_key.setdefault(place.key, []).append((name, place))
    blocks, outside = list[Zeros](), list[Zeros]()
    lists = set(map(list_of, by_key)) - {None}
    for info in out.tensors.values():
        if info.dtype not in FLOAT_TYPES:
            continue
        data = out.read_bytes(info.key)
        if digest(data) != written.get(info.key, digest(data)):
            raise GradpipeError(f"{info.key} reads back otherwise than it was written")
        for name, place in by_key.get(info.key, ()):
            part = data[place.start - info.start : place.stop - info.start]
            zeros = count_zeros(as_tensor(part, place))
            layers[name] = replace(recorded.layers[name], zeros=zeros)
        tensor = as_tensor(data, info)
        found = Zeros(zeros=count_zeros(tensor), size=tensor.numel())
        (blocks if list_of(info.key) in lists else outside).append(found)
    was = recorded.document
    return PruneReport(
        order=order,
        requested=recorded.requested,
        layers=tuple(layers[name] for name in recorded.layers),
        blocks=Zeros.sum(blocks),
        file=Zeros.sum([*blocks, *outside]),
        dense=recorded.dense,
        mismatched_layers=(),
        unseen_layers=(),
        notes=(f"zeros by masks of {was['model']}, which was pruned by {was['command']}",),
    )
