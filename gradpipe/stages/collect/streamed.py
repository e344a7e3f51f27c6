"""The `streamed` schedule: models larger than memory, one block at a time.

All samples go through block i before block i+1, their inputs kept in a scratch folder; then, from
the last block to the first, each is loaded once more, recomputed with hooks on, and run backward
from the saved gradient of its output. Memory is one block, its accumulators and one micro-batch,
whatever the depth; weights are read twice in all, not twice a batch. The numbers are those of the
`resident` schedule, bit for bit on a CPU: the same operations on the same values in the same order.

The model's own forward is left in charge of everything between the blocks. In the recording pass
each block only notes how the model calls it (`BlockCalls`); in the head's pass the last one hands
out what it gave before, and the model's own head and loss give the first gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gradpipe.errors import GradpipeError
from gradpipe.stages.collect.activations import Activations, TensorFile, remaining
from gradpipe.stages.collect.block_calls import BlockCalls
from gradpipe.stages.collect.block_weights import WeightLoader
from gradpipe.stages.collect.hooks import LayerHooks, check_loss, first_overflow, loss_scale, runs
from gradpipe.stages.collect.schedule import Part
from gradpipe.stages.collect.sums import LayerAccumulator
from gradpipe.stages.model.batch import Batch
from gradpipe.stages.model.skeleton import Skeleton
from gradpipe.store.statistics import needs_backward

_OUTSIDE = Part.of_block(None)


class BlockByBlock:
    """A model on micro-batches, one block's weights in memory at a time.

    What passes between blocks is kept on disk.
    """

    def __init__(
        self, skeleton: Skeleton, batches: Sequence[Batch], device: torch.device, scratch: Path
    ) -> None:
        self._model = skeleton.model
        self._blocks = skeleton.blocks
        self._batches = batches
        self._sizes = tuple(map(len, batches))
        self._device = device
        self._loader = WeightLoader(skeleton, device)
        self._calls = BlockCalls(skeleton.model, skeleton.blocks, self._block_weights, device)
        self._files = Activations(scratch, self._sizes, skeleton.blocks.count)

    def _block_weights(self, index: int) -> AbstractContextManager[None]:
        return self._loader.loaded(self._blocks.paths[index] + ".")

    def _other_weights(self) -> AbstractContextManager[None]:
        return self._loader.loaded("", excluded=self._blocks.path + ".")

    def _micro_batches(self) -> Iterator[Batch]:
        return (batch.to(self._device) for batch in self._batches)

    def record(self) -> None:
        """Learn how the model calls its blocks; keep the arguments that depend on the samples."""
        arguments = self._files.arguments
        is_new = not arguments.exists()
        with self._other_weights():
            for batch in self._micro_batches():
                if is_new or not self._calls.knows(len(batch)):
                    different = self._calls.record(batch)
                    if is_new:
                        arguments.write(different)
        if is_new:
            arguments.publish()

    def _given(self, index: int, number: int, source: TensorFile) -> dict[str, Tensor]:
        """What block `index` is called with for a micro-batch, but for what is always the same."""
        names = self._calls.arguments(index, self._sizes[number])
        found = source.read(number) if index else {}
        found |= self._files.arguments.read(number, names)
        return self._to_device(found)

    def _to_device(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self._device) for name, tensor in tensors.items()}


class Streamed(BlockByBlock):
    """One run over `samples`, in micro-batches of `batch_size`: see `Schedule`."""

    is_cumulative = False
    unit = "block-samples"

    def __init__(
        self,
        skeleton: Skeleton,
        statistics: tuple[str, ...],
        samples: Batch,
        batch_size: int,
        device: torch.device,
        scratch: Path,
    ) -> None:
        super().__init__(skeleton, samples.split(batch_size), device, scratch)
        self._layers = skeleton.layers
        self._statistics = statistics
        self._backward = needs_backward(statistics)
        self.restorable: tuple[LayerAccumulator, ...] = ()
        self.num_steps = 2 * len(samples) * skeleton.blocks.count

    def run(
        self, done: frozenset[Part], advance: Callable[[int], None]
    ) -> Iterator[tuple[Part, list[LayerAccumulator]]]:
        """Give out the layers outside the blocks, then each block, last first.

        Layers that run before the blocks, if there are any, make those outside come last.
        """
        wanted = {Part.of_block(layer.spec.block) for layer in self._layers} - done
        if not wanted:
            return
        self.record()
        before, fed = self._before_blocks() if _OUTSIDE in wanted else (set(), {})
        kept = self._files.kept()
        blocks = {part.index for part in wanted - {_OUTSIDE}} | (fed.keys() - kept.outside)
        todo = remaining(
            self._blocks.count,
            kept,
            frozenset(blocks),
            head=_OUTSIDE in wanted,
            backward=self._backward,
        )
        for index in todo.forward:
            self._forward(index, fed.get(index, []), advance)
        outside = self._zeroed(_OUTSIDE, wanted)
        if todo.head:
            self._run_head({p: x for p, x in outside.items() if p not in before}, before)
        if _OUTSIDE in wanted and not before:
            yield _OUTSIDE, list(outside.values())
            outside.clear()
        for index in todo.backward:
            part = Part.of_block(index)
            sums = self._zeroed(part, wanted)
            self._run_block(index, sums, fed.get(index, []), advance)
            if part in wanted:
                yield part, list(sums.values())
            self._files.gradient(index + 1).delete()
            if not (before and index + 1 == self._blocks.count):  # the head may have to run again
                self._files.inputs(index + 1).delete()
        if before:
            self._run_before({p: x for p, x in outside.items() if p in before}, fed)
            yield _OUTSIDE, list(outside.values())

    def _zeroed(self, part: Part, wanted: set[Part]) -> dict[str, LayerAccumulator]:
        """Accumulators of a part's layers, by their modules' paths; none if it is not wanted."""
        return {
            x.path: LayerAccumulator(x.spec, self._statistics, self._device)
            for x in self._layers
            if part in wanted and Part.of_block(x.spec.block) == part
        }

    def _scale(self, num_samples: int) -> float:
        return loss_scale(self._model, num_samples)

    # What blocks are called with.

    def _before_blocks(self) -> tuple[set[str], dict[int, list[str]]]:
        """Layers that run before the blocks, and, by block, the arguments that come from them.

        None where there is no backward pass: their inputs are seen in the head's pass too.
        """
        paths = [layer.path for layer in self._layers if layer.spec.block is None]
        fed: dict[int, list[str]] = {}
        if not self._backward or not paths:
            return set(), fed
        with self._other_weights(), runs(self._model, paths, in_graph=True) as found:
            for name in self._calls.outside(self._batches[0].to(self._device)):
                fed.setdefault(int(name.partition(":")[0]), []).append(name)
        return {path for path, _ in found}, fed

    def _tracked(self, index: int, number: int, fed: list[str]) -> dict[str, Tensor]:
        """The same, what requires gradients when the whole model runs as leaves that do."""
        fixed = {name: self._calls.constant(self._sizes[number], name) for name in fed}
        given = fixed | self._given(index, number, self._files.inputs(index))
        wanted = {x: given[x] for x in (*self._calls.carried(index), *fed)}
        return given | _leaves(wanted, requires_grad=self._backward)

    # Forward: what every block gives.

    def _forward(self, index: int, fed: list[str], advance: Callable[[int], None]) -> None:
        """As a pass that goes back: PyTorch may compute otherwise where no gradient is wanted."""
        target, names = self._files.inputs(index + 1), self._calls.carried(index + 1)
        inside = [layer.path for layer in self._layers if layer.spec.block == index]
        with self._block_weights(index), torch.set_grad_enabled(self._backward):
            for number, size in enumerate(self._sizes):
                found = self._tracked(index, number, fed)
                with runs(self._model, inside, in_graph=self._backward):
                    found |= self._calls.run(index, size, found)
                target.write({name: found[name] for name in names})
                advance(size)
        target.publish()

    # Backward: the head, then block by block, then what runs before the blocks.

    def _run_head(self, sums: dict[str, LayerAccumulator], before: set[str]) -> None:
        depth = self._blocks.count
        source, target = self._files.inputs(depth), self._files.gradient(depth)
        with self._other_weights():
            for number, batch in enumerate(self._micro_batches()):
                given = _leaves(self._to_device(source.read(number)), requires_grad=self._backward)
                is_first = number == 0
                with (
                    self._calls.answered(len(batch), given) as others,
                    LayerHooks(self._model, sums, len(batch), self._scale(len(batch))),
                    runs(self._model, before, in_graph=is_first) as found,
                    torch.set_grad_enabled(self._backward or is_first),
                ):
                    loss = batch.forward(self._model).loss
                    if is_first:
                        _check_independent(loss, [*others, *(output for _, output in found)])
                    check_loss(loss, partial(self._blame, number))
                    if self._backward:
                        if loss.requires_grad:
                            (loss * (len(batch) * self._scale(len(batch)))).backward()
                        target.write(_gradients(given))
        if self._backward:
            target.publish()

    def _blame(self, number: int) -> str | None:
        """The first layer whose output for a micro-batch is not finite, by its saved inputs."""
        self._calls.restore()
        for index, path in enumerate(self._blocks.paths):
            inside = {x.path: x.spec.name for x in self._layers if x.spec.block == index}
            given = self._given(index, number, self._files.inputs(index))
            run = partial(self._calls.run, index, self._sizes[number], given)
            with self._loader.loaded(path + "."):
                name = first_overflow(self._model, inside, run)
            if name is not None:
                return name
        return None

    def _run_block(
        self,
        index: int,
        sums: dict[str, LayerAccumulator],
        fed: list[str],
        advance: Callable[[int], None],
    ) -> None:
        above, below = self._files.gradient(index + 1), self._files.gradient(index)
        outside = self._files.outside(index)
        with self._block_weights(index):
            for number, size in enumerate(self._sizes):
                given = self._tracked(index, number, fed)
                with (
                    LayerHooks(self._model, sums, size, self._scale(size)),
                    torch.set_grad_enabled(self._backward),
                ):
                    answer = self._calls.run(index, size, given)
                    if self._backward:
                        gradients = self._differentiate(answer, given, above.read(number))
                if self._backward:
                    if index and not gradients:  # whose layers would wait for them
                        raise GradpipeError(
                            f"no gradient passes block {self._blocks.paths[index]}: give "
                            "--statistics act_l2"
                        )
                    below.write({x: gradients[x] for x in gradients if x not in fed})
                    if fed:
                        outside.write({x: gradients[x] for x in gradients if x in fed})
                advance(size)
        if self._backward:
            below.publish()
            if fed:
                outside.publish()

    def _differentiate(
        self, answer: dict[str, Tensor], given: dict[str, Tensor], after: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Gradients of what a block is given, from those `after` it of what it gives.

        What passes the block by has the gradient that it has after it, and the block's own.
        """
        after = self._to_device(after)
        roots = [name for name in answer if name in after and answer[name].requires_grad]
        if roots:
            torch.autograd.backward([answer[x] for x in roots], [after[x] for x in roots])
        passing = {name: after[name] for name in after if name not in answer}
        own = _gradients(given)
        both = {name: passing[name] + own[name] for name in passing if name in own}
        return passing | own | both

    def _run_before(self, sums: dict[str, LayerAccumulator], fed: dict[int, list[str]]) -> None:
        """The layers that run before the blocks, from the gradients of the blocks' arguments."""
        files = [self._files.outside(block) for block in fed]
        with self._other_weights():
            for number, batch in enumerate(self._micro_batches()):
                gradients: dict[str, Tensor] = {}
                for file in files:
                    gradients |= self._to_device(file.read(number))
                with LayerHooks(self._model, sums, len(batch), self._scale(len(batch))):
                    tensors = self._calls.outside(batch)
                    names = [name for name in tensors if name in gradients]
                    torch.autograd.backward(
                        [tensors[x] for x in names], [gradients[x] for x in names]
                    )


def _leaves(tensors: dict[str, Tensor], *, requires_grad: bool) -> dict[str, Tensor]:
    """The tensors as leaves, which collect gradients if they can have any."""
    return {
        name: tensor.detach().requires_grad_(requires_grad and tensor.is_floating_point())
        for name, tensor in tensors.items()
    }


def _gradients(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.grad for name, x in tensors.items() if x.grad is not None}


def _check_independent(loss: Tensor, others: list[Tensor]) -> None:
    """Raises GradpipeError if a loss is computed from what it should only depend on by blocks."""
    tracked = [tensor for tensor in others if tensor.requires_grad]
    if tracked and loss.requires_grad:
        found = torch.autograd.grad(loss, tracked, retain_graph=True, allow_unused=True)
        if any(gradient is not None for gradient in found):
            raise GradpipeError(
                "this model's head reads more than its last block gives: use --schedule resident"
            )
