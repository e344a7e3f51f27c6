"""The `resident` schedule: an ordinary forward and backward of the whole model, hooks on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from gradpipe.errors import GradpipeError
from gradpipe.stages.collect.block_weights import aligned, check_loaded
from gradpipe.stages.collect.hooks import (
    LayerHooks,
    check_loss,
    first_overflow,
    loss_scale,
    never_ran,
    runs,
)
from gradpipe.stages.collect.placement import Placement, dispatch
from gradpipe.stages.collect.schedule import Part
from gradpipe.stages.collect.sums import LayerAccumulator
from gradpipe.stages.model.batch import Batch
from gradpipe.stages.model.experts import is_split, split_experts
from gradpipe.stages.model.load import load_model
from gradpipe.stages.model.skeleton import Skeleton
from gradpipe.stages.model.tasks import find_task
from gradpipe.store.schema import IMAGE_CLASSIFICATION


class Resident:
    """One run over `samples`, in micro-batches of `batch_size`: see `Schedule`."""

    is_cumulative = True
    unit = "samples"

    def __init__(
        self,
        skeleton: Skeleton,
        statistics: tuple[str, ...],
        samples: Batch,
        batch_size: int,
        placement: Placement,
    ) -> None:
        """The sums are zero; the model is loaded when it is first needed."""
        self._skeleton = skeleton
        self._samples = samples
        self._batch_size = batch_size
        self._placement = placement
        self._sums = {
            x.path: LayerAccumulator(x.spec, statistics, placement.of(x.path))
            for x in skeleton.layers
        }
        self.restorable = list(self._sums.values())
        self.num_steps = len(samples)

    def run(
        self, done: frozenset[Part], advance: Callable[[int], None]
    ) -> Iterator[tuple[Part, list[LayerAccumulator]]]:
        """Give out all layers' sums after each micro-batch; `done` are the samples in them."""
        count = max((part.index for part in done), default=0)
        advance(count)
        if count == len(self._samples):
            return
        model, device = self._load(), self._placement.main
        for batch in self._samples[count:].split(self._batch_size):
            resident_batch(model, self._sums, batch.to(device), self._skeleton.blocks.paths)
            count += len(batch)
            advance(len(batch))
            yield Part.of_samples(count), self.restorable

    def _load(self) -> Any:
        checkpoint = self._skeleton.checkpoint
        placement, dtype = self._placement, self._skeleton.model.dtype
        model = load_model(checkpoint, dtype, placement.main, placement.device_map)
        split_experts(model, self._skeleton.sources)
        dispatch(model, placement)
        is_of_images = find_task(checkpoint) == IMAGE_CLASSIFICATION  # the head reads one vector
        for part in [model] if is_of_images else filter(is_split, model.modules()):
            for parameter in part.parameters():
                parameter.data = aligned(parameter.data)
        check_loaded(model, self._skeleton)
        return model


def resident_batch(
    model: Any, sums: Mapping[str, LayerAccumulator], batch: Batch, blocks: Sequence[str] = ()
) -> None:
    """One batch forward and, if a statistic needs it, backward.

    The loss differentiated is the model's own loss of each sample, so that a sample
    weighs the same in any batch. `sums` has the accumulators under their modules' paths. Raises
    GradpipeError for a loss that is not finite, and for one of the modules at the paths `blocks`
    that does not run.
    """
    num_samples = len(batch)
    backward = any(accumulator.needs_gradients for accumulator in sums.values())
    scale = loss_scale(model, num_samples)
    hooks = LayerHooks(model, sums, num_samples, scale)

    def find_overflow() -> str | None:
        hooks.remove()
        names = {path: accumulator.spec.name for path, accumulator in sums.items()}
        return first_overflow(model, names, lambda: batch.forward(model))

    with hooks, torch.set_grad_enabled(backward):
        with runs(model, blocks) as found:
            loss = batch.forward(model).loss
        if missing := set(blocks) - {path for path, _ in found}:
            raise GradpipeError(never_ran(min(missing, key=blocks.index)))
        check_loss(loss, find_overflow)
        if backward and loss.requires_grad:  # else the hooks name a layer that it leaves out
            (loss * (num_samples * scale)).backward()
