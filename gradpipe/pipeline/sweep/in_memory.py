"""One model in memory, pruned again and again: layer by layer, by the code that writes files.

Each pruning writes every layer that the one before it wrote: there is nothing else to undo. The
checkpoint's files are only read.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor

from gradpipe.pipeline.prune.coverage import Uncovered
from gradpipe.pipeline.prune.files import prune_layer
from gradpipe.pipeline.prune.plan import AllocatedPlan, PrunePlan
from gradpipe.pipeline.prune.workers import side_by_side
from gradpipe.pipeline.reports.results import LayerResult
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.checkpoint.tensors import TensorInfo, as_tensor, count_zeros, tensor_bytes
from gradpipe.stages.model.refill import Refill


class PrunedModel:
    """A loaded model whose layers are exchanged for pruned ones."""

    def __init__(self, model: Any, plan: PrunePlan) -> None:
        """`plan` is any of those to come: all prune the same layers."""
        self.model = model
        self._refill = Refill(model, plan.checkpoint)
        self.uncovered = Uncovered.of(plan)
        self._names: dict[str, list[str]] = {}  # of a tensor's layers
        for name in (x for file in plan.checkpoint.files for x in plan.in_file(file)):
            self._names.setdefault(plan.layers[name].weight_key, []).append(name)
        self._groups = self._refill.together(self._names)

    def prune(self, allocated: AllocatedPlan, advance: Callable[[int], None]) -> list[LayerResult]:
        """Put a plan's one target into the model; `advance` hears of layers done.

        Raises as `pipe prune` does.
        """
        found: dict[str, LayerResult] = {}
        with side_by_side(allocated.plan.workers) as pool:
            for results in pool.map(partial(self._fill, allocated), self._groups):
                found |= {result.name: result for result in results}
                advance(len(results))
        return [found[name] for name in allocated.plan.in_order()]

    def _fill(self, allocated: AllocatedPlan, keys: tuple[str, ...]) -> list[LayerResult]:
        """Prune the layers of tensors that make one parameter, and write it."""
        checkpoint, results, tensors = allocated.plan.checkpoint, [], {}
        [target] = allocated.plan.targets
        for key in keys:
            tensor = _Tensor(checkpoint, checkpoint.tensors[key])
            for name in self._names.get(key, ()):
                zeros, _, _ = prune_layer(allocated, name, tensor.take)
                results.append(allocated.result(target, name, zeros))
            tensors[key] = tensor.whole()
        self._refill.write(tensors)
        return results


class _Tensor:
    """A tensor of the checkpoint while its layers are exchanged; read if they do not fill it."""

    def __init__(self, checkpoint: Checkpoint, info: TensorInfo) -> None:
        self._checkpoint = checkpoint
        self._info = info
        self._data: memoryview | None = None

    def take(self, place: TensorInfo, tensors: Iterable[Tensor]) -> int:
        """Keep the one tensor that is to stand in a place; returns how many zeros it has."""
        [tensor] = tensors
        data, whole = tensor_bytes(tensor).cast("B"), self._info
        if (place.start, place.stop) == (whole.start, whole.stop):
            self._data = data
        else:
            self._read()[place.start - whole.start : place.stop - whole.start] = data
        return count_zeros(tensor)

    def whole(self) -> Tensor:
        """In the checkpoint's shape and dtype."""
        return as_tensor(self._read(), self._info)

    def _read(self) -> memoryview:
        if self._data is None:
            self._data = self._checkpoint.read_place(self._info)
        return self._data


def dense_layers(plan: PrunePlan) -> list[LayerResult]:
    """The layers as the checkpoint has them."""

    def result(name: str) -> LayerResult:
        place = plan.places[name]
        zeros = count_zeros(as_tensor(plan.checkpoint.read_place(place), place))
        return LayerResult(
            name=name, requested=0.0, zeros=zeros, size=plan.layers[name].num_weights
        )

    with side_by_side(plan.workers) as pool:
        return list(pool.map(result, plan.in_order()))
