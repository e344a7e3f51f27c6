"""Perplexity of a model larger than memory: all windows through one block after the other.

As the streamed schedule of stage one, forward alone: what passes from block to block is kept in a
scratch folder, and the model's own head and loss come last. The figure is the whole model's, bit
for bit on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradpipe.stages.collect.activations import Activations
from gradpipe.stages.collect.block_calls import BlockCalls
from gradpipe.stages.collect.block_weights import WeightLoader
from gradpipe.stages.evaluate.perplexity import MeanLoss
from gradpipe.stages.model.batch import Batch
from gradpipe.stages.model.skeleton import Skeleton


@torch.no_grad()
def streamed_perplexity(
    skeleton: Skeleton,
    windows: npt.NDArray[np.int64],
    batch_size: int,
    device: torch.device,
    scratch: Path,
    advance: Callable[[int], None] = lambda _: None,
) -> float:
    """As `perplexity`; `scratch` is an empty folder, `advance` hears of each block's windows."""
    batches = Batch.of_tokens(torch.from_numpy(windows)).split(batch_size)
    run = _Run(skeleton, batches, device, scratch)
    run.record()
    for index in range(skeleton.blocks.count):
        run.forward(index, advance)
    mean = MeanLoss(len(windows))
    for batch, loss in zip(batches, run.losses(), strict=True):
        mean.add(loss, len(batch))
    return mean.perplexity


class _Run:
    """One model on some micro-batches."""

    def __init__(
        self, skeleton: Skeleton, batches: Sequence[Batch], device: torch.device, scratch: Path
    ) -> None:
        self._model, self._blocks = skeleton.model, skeleton.blocks
        self._batches, self._device = batches, device
        self._loader = WeightLoader(skeleton, device)
        self._calls = BlockCalls(skeleton.model, skeleton.blocks, self._block_weights, device)
        self._files = Activations(scratch, tuple(map(len, batches)), skeleton.blocks.count)

    def record(self) -> None:
        """Learn how the model calls its blocks, and with what."""
        with self._other_weights():
            for batch in self._batches:
                self._files.arguments.write(self._calls.record(batch.to(self._device)))
        self._files.arguments.publish()

    def forward(self, index: int, advance: Callable[[int], None]) -> None:
        """What one block gives; what came into it is not needed any more."""
        source, target = self._files.inputs(index), self._files.inputs(index + 1)
        names = self._calls.carried(index + 1)
        with self._block_weights(index):
            for number, batch in enumerate(self._batches):
                found = source.read(number) if index else {}
                own = self._calls.arguments(index, len(batch))
                found |= self._files.arguments.read(number, own)
                found = self._moved(found)
                found |= self._calls.run(index, len(batch), found)
                target.write({name: found[name] for name in names})
                advance(len(batch))
        target.publish()
        if index:
            source.delete()

    def losses(self) -> Iterator[Any]:
        """Of each micro-batch, by the model's head."""
        source = self._files.inputs(self._blocks.count)
        with self._other_weights():
            for number, batch in enumerate(self._batches):
                given = self._moved(source.read(number))
                with self._calls.answered(len(batch), given):
                    loss = batch.to(self._device).forward(self._model).loss
                yield loss

    def _moved(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self._device) for name, tensor in tensors.items()}

    def _block_weights(self, index: int) -> AbstractContextManager[None]:
        return self._loader.loaded(self._blocks.paths[index] + ".")

    def _other_weights(self) -> AbstractContextManager[None]:
        return self._loader.loaded("", excluded=self._blocks.path + ".")
