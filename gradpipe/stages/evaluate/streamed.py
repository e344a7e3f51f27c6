"""Perplexity of a model larger than memory: all windows through one block after the other.

As the streamed schedule of stage one, forward alone: what passes from block to block is kept in a
scratch folder, and the model's own head and loss come last. The figure is the whole model's, bit
for bit on a CPU.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gradpipe.stages.collect.streamed import BlockByBlock
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


class _Run(BlockByBlock):
    """The passes forward, and the head."""

    def forward(self, index: int, advance: Callable[[int], None]) -> None:
        """What one block gives; what came into it is not needed any more."""
        source, target = self._files.inputs(index), self._files.inputs(index + 1)
        names = self._calls.carried(index + 1)
        with self._block_weights(index):
            for number, size in enumerate(self._sizes):
                found = self._given(index, number, source)
                found |= self._calls.run(index, size, found)
                target.write({name: found[name] for name in names})
                advance(size)
        target.publish()
        if index:
            source.delete()

    def losses(self) -> Iterator[Any]:
        """Of each micro-batch, by the model's head."""
        source = self._files.inputs(self._blocks.count)
        with self._other_weights():
            for number, batch in enumerate(self._micro_batches()):
                given = self._to_device(source.read(number))
                with self._calls.answered(len(batch), given):
                    loss = batch.forward(self._model).loss
                yield loss
