"""Whether a pruned checkpoint is what its `pruning.json` says, and what was made of the dense one.

Tensor by tensor, so that memory is one tensor's, or two with a base. No store is needed, and no
model is built.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console

from gradpipe.errors import GradpipeError, InputError
from gradpipe.pipeline.masks import METHOD as MASKS
from gradpipe.pipeline.places import REPORT
from gradpipe.pipeline.progress import QUIET, progress_bar
from gradpipe.pipeline.reports.recorded import Recorded
from gradpipe.pipeline.reports.results import LayerResult, Zeros
from gradpipe.stages.checkpoint import soundness
from gradpipe.stages.checkpoint.folder import INDEX_NAME, SINGLE_NAME, Checkpoint
from gradpipe.stages.checkpoint.layer_names import find_layer
from gradpipe.stages.checkpoint.place import locate
from gradpipe.stages.checkpoint.tensors import FLOAT_TYPES, TensorInfo, as_tensor, count_zeros
from gradpipe.stages.checkpoint.tied import tied_to
from gradpipe.stages.prune.methods import UPDATES
from gradpipe.stages.prune.target import Pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was found of a checkpoint that is as it should be."""

    model: str
    base: str | None  # the dense model that it was held against
    num_layers: int
    num_tensors: int
    sparsity: float  # of all weights of the file

    @property
    def summary(self) -> str:
        """On one line."""
        beside = "" if self.base is None else f", and of the weights of {self.base}"
        return (
            f"{self.model}: {self.num_layers} layers as pruning.json records{beside}; "
            f"{self.num_tensors} tensors, {self.sparsity:.4f} of their weights zero"
        )


def verify(model: str, base: str | None = None, console: Console = QUIET) -> Verified:
    """Read every tensor of a pruned checkpoint, and hold it against its record and its base.

    Args:
        model: A folder that `prune` or `apply_masks` wrote, or a Hub id of one.
        base: The dense checkpoint that it was made from: what was kept is compared with it.
        console: Where progress is shown; nowhere by default.

    Returns:
        How much was found to be as it should.

    Raises:
        InputError: If there is no such checkpoint, or no `pruning.json` in it.
        GradpipeError: With the name of the first tensor that is not as it should be, and how many
            others are not.

    Example:
        >>> from pathlib import Path
        >>> from gradpipe import PruneConfig, prune, verify
        >>> config = PruneConfig(model="embedded", store="store", out=Path("verified"))
        >>> pruned = prune(config)
        >>> verify("verified", base="embedded").num_layers
        28
    """
    recorded = Recorded.read(locate(model, ("config.json", REPORT))[0])
    pruned, dense = _open(model), None if base is None else Checkpoint.open(base)
    checks = _Checks(recorded, pruned, dense)
    problems = [*_index_problems(pruned), *checks.names()]
    if not problems:
        with progress_bar(console, "verifying", len(pruned.tensors), "tensors") as advance:
            problems += checks.tensors(advance)
        problems += checks.whole()
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise GradpipeError(f"{model}: {problems[0]}{more}")
    return Verified(
        model=model,
        base=base,
        num_layers=len(recorded.layers),
        num_tensors=len(pruned.tensors),
        sparsity=recorded.file_sparsity,
    )


def _open(model: str) -> Checkpoint:
    """The checkpoint whose files are in question: what is wrong with them is a finding."""
    try:
        return Checkpoint.open(model)
    except InputError as error:
        raise GradpipeError(str(error)) from error


def _index_problems(pruned: Checkpoint) -> Iterator[str]:
    """Tensors that the files hold and the index does not name; the other way opening refuses."""
    if pruned.files == (SINGLE_NAME,):
        return
    named = json.loads((pruned.folder / INDEX_NAME).read_bytes())["weight_map"]
    for key in pruned.tensors.keys() - named.keys():
        yield f"{key} is in {pruned.tensors[key].file}, and {INDEX_NAME} does not name it"


class _Checks:
    """The findings of one checkpoint, a line each; the tensor's or layer's name comes first."""

    def __init__(self, recorded: Recorded, pruned: Checkpoint, dense: Checkpoint | None) -> None:
        self._recorded = recorded
        self._pruned = pruned
        self._dense = dense
        self._places = {
            x.name: find_layer(pruned, x.name, x.size) for x in recorded.layers.values()
        }
        self._found: list[Zeros] = []

    def names(self) -> Iterator[str]:
        """Layers and tensors that are not there, or of another size."""
        for name, place in self._places.items():
            if place is None:
                yield f"{name} has no weights of the recorded size in the files"
        if self._dense is None:
            return
        kinds = [
            {k: (x.shape, x.dtype) for k, x in c.tensors.items()}
            for c in (self._pruned, self._dense)
        ]
        for key in sorted(kinds[0].keys() | kinds[1].keys()):
            mine, theirs = (kind.get(key) for kind in kinds)
            if mine != theirs:
                yield f"{key}: {_shown(mine)} here, {_shown(theirs)} in {self._dense.name}"

    def tensors(self, advance: Callable[[int], None]) -> Iterator[str]:
        """What is wrong with each tensor's values, in the files' order."""
        places: dict[str, list[tuple[TensorInfo, LayerResult]]] = {}
        for name, place in self._places.items():
            if place is not None:
                places.setdefault(place.key, []).append((place, self._recorded.layers[name]))
        for info in sorted(self._pruned.tensors.values(), key=lambda x: (x.file, x.start)):
            layers = sorted(places.get(info.key, ()), key=lambda x: x[0].start)
            yield from self._tensor(info, layers)
            advance(1)

    def whole(self) -> Iterator[str]:
        """What is wrong with the checkpoint as a whole."""
        sparsity = Zeros.sum(self._found).sparsity
        if sparsity != self._recorded.file_sparsity:
            yield (
                f"the file's sparsity is {sparsity}, recorded is {self._recorded.file_sparsity}: "
                "a tensor that is no layer has other zeros"
            )
        for key, other in tied_to(self._pruned, self._dense):
            yield f"{key} is not {other}, to which the model ties it"

    def _tensor(
        self, info: TensorInfo, layers: list[tuple[TensorInfo, LayerResult]]
    ) -> Iterator[str]:
        data = self._pruned.read_bytes(info.key)
        base = None if self._dense is None else self._dense.read_bytes(info.key)
        if info.dtype in FLOAT_TYPES:
            tensor = as_tensor(data, info)
            self._found.append(Zeros(zeros=count_zeros(tensor), size=tensor.numel()))
            if not soundness.is_finite(tensor):
                yield f"{info.key} holds NaN or infinite values"
        end = 0
        for place, layer in layers:
            part = slice(place.start - info.start, place.stop - info.start)
            if base is not None and data[end : part.start] != base[end : part.start]:
                yield f"{info.key} differs from the base's outside the pruned layers"
            end = part.stop
            yield from self._layer(place, layer, data[part], base and base[part])
        if base is not None and data[end:] != base[end:]:
            yield f"{info.key} differs from the base's, and is not recorded as pruned"

    def _layer(
        self, place: TensorInfo, layer: LayerResult, data: memoryview, base: memoryview | None
    ) -> Iterator[str]:
        weight = as_tensor(data, place)
        dense = None if base is None else as_tensor(base, place)
        if (zeros := count_zeros(weight)) != layer.zeros:
            yield f"{layer.name} has {zeros} zeros of {layer.size}, recorded are {layer.zeros}"
        pattern = None if layer.pattern is None else Pattern.parse(layer.pattern)
        if pattern is not None and not soundness.has_pattern(weight, pattern.n, pattern.m):
            yield f"{layer.name} is not {layer.pattern} sparse, as it is recorded to be"
        if dense is None:
            return
        if negative := soundness.count_negative_zeros(weight, dense):
            yield f"{layer.name} holds −0.0 in {negative} places"
        if self._is_updated(layer.name):
            return
        if changed := soundness.count_changed(weight, dense):
            yield (
                f"{layer.name} differs from the base's in {changed} weights that were kept, and "
                "no update of them is recorded"
            )

    def _is_updated(self, layer: str) -> bool:
        """Whether the weights that a layer kept were changed, by what is recorded."""
        recorded = self._recorded
        update = UPDATES.get(recorded.update)
        solves = recorded.score is None and recorded.method != MASKS  # any solver, known or not
        changes = solves or update is None or update.make is not None
        return changes and layer not in recorded.unseen


def _shown(kind: tuple[tuple[int, ...], str] | None) -> str:
    return "none" if kind is None else f"{kind[1]} {kind[0]}"
