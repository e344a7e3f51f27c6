"""The `streamed` schedule: models larger than memory, one block at a time.

All samples go through block i before block i+1, their inputs kept in a scratch folder; then, from
the last block to the first, each is loaded once more, recomputed with hooks on, and run backward
from the saved gradient of its output. Memory is one block, its accumulators and one micro-batch,
whatever the depth; weights are read twice in all, not twice a batch. The numbers are those of the
`resident` schedule, bit for bit on a CPU: the same operations on the same values in the same order.

The model's own forward is left in charge of everything between the blocks. In the capturing pass
each block only records the arguments that the model calls it with; in the head's pass the last
one hands out the saved hidden states, and the model's own head and loss give the first gradient.

Shapes: N samples, B of a micro-batch, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradpipe.errors import GradpipeError
from gradpipe.stages.collect.activations import ActivationFile
from gradpipe.stages.collect.block_weights import WeightLoader
from gradpipe.stages.collect.hooks import LayerHooks, first_overflow
from gradpipe.stages.collect.resident import check_loss, loss_scale
from gradpipe.stages.collect.sums import LayerAccumulator
from gradpipe.stages.model.batch import Batch
from gradpipe.stages.model.layers import Layer, Skeleton
from gradpipe.store.statistics import needs_backward


@dataclass(frozen=True, slots=True)
class _Call:
    """How the model calls a block, less the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _AllCaptured(Exception):  # noqa: N818 (it reports success: the rest of the pass is not needed)
    pass


class Streamed:
    """One run of the schedule over `samples`, in micro-batches of `batch_size`."""

    def __init__(
        self,
        skeleton: Skeleton,
        samples: Batch,
        batch_size: int,
        scratch: Path,
        device: torch.device,
    ) -> None:
        """`scratch` may hold what an earlier, killed run left."""
        self._model = skeleton.model
        self._blocks = skeleton.blocks
        self._layers = skeleton.layers
        self._loader = WeightLoader(skeleton.model, skeleton.checkpoint, device)
        self._samples = samples
        self._starts = range(0, len(samples), batch_size)
        self._batch_size = batch_size
        self._scratch = scratch
        self._device = device
        self._calls: dict[int, list[_Call]] = {}  # size of the micro-batch -> call of each block
        self._tuple_tail: tuple[Any, ...] | None = None  # what a block returns beside hidden states

    def run(
        self,
        statistics: tuple[str, ...],
        done: frozenset[int | None],
        advance: Callable[[int], None],
    ) -> Iterator[tuple[int | None, list[LayerAccumulator]]]:
        """Yield each block's index and finished accumulators, last block first.

        Layers outside the blocks come first, under None. What is in `done` is not computed again,
        and a block may be added to the store's record as soon as it has been yielded. `advance`
        hears of each micro-batch; it may raise to stop.
        """
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._capture(done)
        backward = needs_backward(statistics)
        self._forward(advance)
        depth = self._blocks.count
        if backward or any(x.spec.block is None for x in self._layers):
            outside = [x for x in self._layers if x.spec.block is None and None not in done]
            sums = self._zeros(outside, statistics)
            if sums or (backward and not self._next_gradient_exists(depth)):
                self._run_head(sums, backward=backward)
            if None not in done:
                yield None, list(sums.values())
        for index in reversed(range(depth)):
            if index in done and (not backward or self._next_gradient_exists(index)):
                continue
            inside = [x for x in self._layers if x.spec.block == index and index not in done]
            sums = self._zeros(inside, statistics)
            self._run_block(index, sums, advance, backward=backward)
            if index not in done:
                yield index, list(sums.values())
            self._inputs(index + 1).delete()
            self._gradient(index + 1).delete()

    def _zeros(
        self, layers: list[Layer], statistics: tuple[str, ...]
    ) -> dict[str, LayerAccumulator]:
        """An accumulator for each layer, under the path of its module."""
        return {x.path: LayerAccumulator(x.spec, statistics, self._device) for x in layers}

    def _next_gradient_exists(self, index: int) -> bool:
        """True if this block's work, or that of one before it, has left its gradient."""
        return any(self._gradient(i).exists() for i in range(index + 1))

    def _inputs(self, index: int) -> ActivationFile:
        return self._file(f"inputs-{index:04d}")

    def _gradient(self, index: int) -> ActivationFile:
        """Gradient of the loss with respect to the inputs of block `index`."""
        return self._file(f"gradient-{index:04d}")

    def _file(self, name: str) -> ActivationFile:
        return ActivationFile(self._scratch / name, self._shape_NTH, self._dtype)

    def _micro_batches(self) -> Iterator[tuple[int, Batch]]:
        for start in self._starts:
            yield start, self._samples[start : start + self._batch_size].to(self._device)

    # Capturing: embeddings, masks, positions.

    def _capture(self, done: frozenset[int | None]) -> None:
        """Record block 0's inputs, and the arguments of every block."""
        resumed = False
        with self._loader.loaded("", excluded=self._blocks.path + "."):
            for start, batch in self._micro_batches():
                if resumed and len(batch) in self._calls:
                    continue
                hidden_BTH = self._capture_batch(batch)
                if start == 0:
                    self._shape_NTH = (len(self._samples), *hidden_BTH.shape[1:])
                    self._dtype = hidden_BTH.dtype
                    if self._has_begun_backward() and not self._can_go_on(done):
                        self._clear()
                    resumed = self._inputs(0).exists() or self._has_begun_backward()
                if not resumed:
                    self._inputs(0).write(start, hidden_BTH)
        if not resumed:
            self._inputs(0).publish()

    def _has_begun_backward(self) -> bool:
        return self._next_gradient_exists(self._blocks.count)

    def _can_go_on(self, done: frozenset[int | None]) -> bool:
        """True if all files are there that the backward pass still needs."""
        depth = self._blocks.count
        reached = next(i for i in range(depth + 1) if self._gradient(i).exists())
        todo = [i for i in range(depth) if i < reached or i not in done]
        return (
            all(self._inputs(i).exists() for i in todo)
            and all(self._gradient(i + 1).exists() for i in todo if i >= reached)
            and (None in done or self._inputs(depth).exists())
        )

    def _clear(self) -> None:
        """Start the scratch folder anew."""
        for path in self._scratch.iterdir():
            path.unlink()

    @torch.no_grad()
    def _capture_batch(self, batch: Batch) -> Tensor:
        """One pass up to the last block, blocks recording; returns the first one's input."""
        if self._tuple_tail is None:
            self._probe(batch)
        inputs: list[Tensor] = []
        calls: list[_Call] = []

        def record(index: int, hidden_BTH: Tensor, call: _Call) -> Any:
            inputs.append(hidden_BTH)
            calls.append(call)
            if index == self._blocks.count - 1:
                raise _AllCaptured
            return self._returned(hidden_BTH)

        with self._replaced(record), suppress(_AllCaptured):
            batch.forward(self._model)
        self._remember(len(batch), calls)
        return inputs[0]

    def _probe(self, batch: Batch) -> None:
        """Run the first block once, to see whether blocks return a tensor or a tuple."""

        def record(_: int, hidden_BTH: Tensor, call: _Call) -> Any:
            block = self._block(0)
            del block.forward
            with self._loader.loaded(self._blocks.paths[0] + "."):
                output = block(hidden_BTH, *call.args, **call.kwargs)
            self._tuple_tail = tuple(output[1:]) if isinstance(output, tuple) else ()
            self._is_tuple = isinstance(output, tuple)
            raise _AllCaptured

        with self._replaced(record), suppress(_AllCaptured):
            batch.forward(self._model)

    def _returned(self, hidden_BTH: Tensor) -> Any:
        """`hidden_BTH` as a block would return it."""
        return (hidden_BTH, *(self._tuple_tail or ())) if self._is_tuple else hidden_BTH

    def _remember(self, size: int, calls: list[_Call]) -> None:
        """Keep one call per block and batch size: arguments must not depend on the data."""
        known = self._calls.setdefault(size, calls)
        for index, (a, b) in enumerate(zip(known, calls, strict=True)):
            if not _equal((a.args, a.kwargs), (b.args, b.kwargs)):
                raise GradpipeError(
                    f"block {index} of this model takes arguments that depend on the data: "
                    "use --schedule resident"
                )

    @contextmanager
    def _replaced(self, handle: Callable[[int, Tensor, _Call], Any]) -> Iterator[None]:
        """Blocks call `handle` in place of their own forward."""
        for index in range(self._blocks.count):
            self._block(index).forward = _stub(index, handle)
        try:
            yield
        finally:
            self._restore_blocks()

    def _restore_blocks(self) -> None:
        for index in range(self._blocks.count):
            self._block(index).__dict__.pop("forward", None)

    def _block(self, index: int) -> Any:
        return self._model.get_submodule(self._blocks.paths[index])

    # Forward: inputs of every block.

    @torch.no_grad()
    def _forward(self, advance: Callable[[int], None]) -> None:
        if self._has_begun_backward():
            return
        for index in range(self._blocks.count):
            if self._inputs(index + 1).exists():
                continue
            output = self._inputs(index + 1)
            with self._loader.loaded(self._blocks.paths[index] + "."):
                for start, batch in self._micro_batches():
                    x_BTH = self._inputs(index).read(start, len(batch)).to(self._device)
                    output.write(start, self._call_block(index, x_BTH))
                    advance(len(batch))
            output.publish()

    def _call_block(self, index: int, x_BTH: Tensor) -> Tensor:
        call = self._calls[len(x_BTH)][index]
        output = self._block(index)(x_BTH, *call.args, **call.kwargs)
        hidden: Tensor = output[0] if self._is_tuple else output
        return hidden

    # Backward: the head, then block by block.

    def _run_head(
        self,
        sums: Mapping[str, LayerAccumulator],
        *,
        backward: bool,
    ) -> None:
        depth = self._blocks.count
        scale = loss_scale(self._model)
        with self._loader.loaded("", excluded=self._blocks.path + "."):
            for start, batch in self._micro_batches():
                leaf_BTH = self._inputs(depth).read(start, len(batch)).to(self._device)
                leaf_BTH.requires_grad_(backward)

                def hand_out(index: int, hidden: Tensor, _: _Call, leaf: Tensor = leaf_BTH) -> Any:
                    return self._returned(leaf if index == depth - 1 else hidden)

                with (
                    self._replaced(hand_out),
                    LayerHooks(self._model, sums, len(batch), scale),
                    torch.set_grad_enabled(backward),
                ):
                    loss = batch.forward(self._model).loss
                    check_loss(loss, partial(self._blame, start))
                    if backward:
                        (loss * (len(batch) * scale)).backward()
                        self._gradient(depth).write(start, _grad_of(leaf_BTH))
        if backward:
            self._gradient(depth).publish()

    def _blame(self, start: int) -> str | None:
        """The first layer whose output for a micro-batch is not finite, by its saved inputs."""
        self._restore_blocks()
        for index in range(self._blocks.count):
            inside = {x.path: x.spec.name for x in self._layers if x.spec.block == index}
            count = min(self._batch_size, len(self._samples) - start)
            x_BTH = self._inputs(index).read(start, count).to(self._device)
            with self._loader.loaded(self._blocks.paths[index] + "."):
                name = first_overflow(self._model, inside, partial(self._call_block, index, x_BTH))
            if name is not None:
                return name
        return None

    def _run_block(
        self,
        index: int,
        sums: Mapping[str, LayerAccumulator],
        advance: Callable[[int], None],
        *,
        backward: bool,
    ) -> None:
        scale = loss_scale(self._model)
        with self._loader.loaded(self._blocks.paths[index] + "."):
            for start, batch in self._micro_batches():
                x_BTH = self._inputs(index).read(start, len(batch)).to(self._device)
                x_BTH.requires_grad_(backward)
                with (
                    LayerHooks(self._model, sums, len(batch), scale),
                    torch.set_grad_enabled(backward),
                ):
                    output_BTH = self._call_block(index, x_BTH)
                    if backward:
                        dy_BTH = self._gradient(index + 1).read(start, len(batch))
                        output_BTH.backward(dy_BTH.to(self._device))
                        self._gradient(index).write(start, _grad_of(x_BTH))
                advance(len(batch))
        if backward:
            self._gradient(index).publish()


def _stub(index: int, handle: Callable[[int, Tensor, _Call], Any]) -> Callable[..., Any]:
    """A block's forward that only says what it was called with."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if args:
            return handle(index, args[0], _Call(args[1:], kwargs))
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return handle(index, kwargs["hidden_states"], _Call((), rest))

    return forward


def _grad_of(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise GradpipeError("no gradient reaches this model's blocks: is its loss a constant?")
    return leaf.grad


def _equal(a: Any, b: Any) -> bool:
    """Whether two calls are the same, tensors by value."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, nn.Module) or callable(a):
        return a is b
    return type(a) is type(b) and (a is b or bool(a == b))
