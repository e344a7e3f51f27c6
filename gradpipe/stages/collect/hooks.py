"""Hooks that feed each layer's input and output gradient to its accumulator.

The weights stay frozen: a forward hook keeps the input, a tensor hook on the output receives its
gradient, folds the two into the sums and lets go of both. Reading `param.grad` instead would
need a buffer per weight, mix the samples of a batch, and see reduced gradients under sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradpipe.errors import GradpipeError
from gradpipe.stages.collect.sums import LayerAccumulator
from gradpipe.stages.model.experts import RoutedLinear
from gradpipe.store.schema import LayerSpec


class LayerHooks:
    """A context in which every pass of the model over one batch feeds the accumulators."""

    def __init__(
        self,
        model: nn.Module,
        sums: Mapping[str, LayerAccumulator],
        num_samples: int,
        scale: float,
    ) -> None:
        """Nothing is attached yet.

        `sums` has each layer's accumulator under the path of its module, `num_samples` is the
        batch's size, `scale` what its loss is multiplied by.
        """
        self._model = model
        self._sums = sums
        self._num_samples = num_samples
        self._scale = scale
        self._handles: list[RemovableHandle] = []
        self._seen: set[str] = set()
        self._inputs: dict[str, ref[Tensor]] = {}  # by layer, of this pass

    def __enter__(self) -> Self:
        """Attach the hooks."""
        for path, accumulator in self._sums.items():
            module = self._model.get_submodule(path)
            self._handles.append(module.register_forward_hook(self._hook(accumulator)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the hooks."""
        self.remove()

    def remove(self) -> None:
        """Let passes go by unheard, from here on."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, accumulator: LayerAccumulator) -> Any:
        def forward(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            self._check_once(accumulator.spec.name)
            self._check_shared(accumulator.spec, inputs[0])
            is_routed = isinstance(module, RoutedLinear)
            by_sample = self._by_routed_sample(*inputs[1:]) if is_routed else self._by_sample
            xs_TI = by_sample(inputs[0].detach())
            accumulator.add_inputs(xs_TI)
            if accumulator.needs_outputs:
                accumulator.add_outputs(by_sample(output.detach()))
            if accumulator.needs_gradients and output.requires_grad:

                def backward(gradient: Tensor) -> None:
                    accumulator.add_gradients(xs_TI, by_sample(gradient), self._scale)

                output.register_hook(backward)

        return forward

    def _check_once(self, name: str) -> None:
        """A sample's gradient is only whole if the layer runs once in a pass."""
        if name in self._seen:
            raise GradpipeError(
                f"layer {name} runs twice in one pass (shared weights): name blocks without it by "
                "--blocks, or leave out --include; a model that shares a block is not supported"
            )
        self._seen.add(name)

    def _check_shared(self, spec: LayerSpec, tensor: Tensor) -> None:
        """A layer must read what the layer did that it is said to share its input with."""
        self._inputs[spec.name] = ref(tensor)
        if spec.input_of is not None and self._inputs[spec.input_of]() is not tensor:
            raise GradpipeError(f"layers {spec.input_of} and {spec.name} read different inputs")

    def _by_sample(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """B of (T, width), also where the block has made it (B·T, width), as OPT's MLP does."""
        return tensor.reshape(self._num_samples, -1, tensor.shape[-1]).unbind()

    def _by_routed_sample(
        self, routed_R: Tensor, num_tokens: int
    ) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """As `_by_sample`, of the rows (R, width) that one expert got of the batch's tokens."""
        sample_R = routed_R.div(num_tokens // self._num_samples, rounding_mode="floor")
        counts = torch.bincount(sample_R, minlength=self._num_samples).tolist()
        return lambda tensor: tensor.split(counts)


def first_overflow(
    model: nn.Module, names: Mapping[str, str], run: Callable[[], object]
) -> str | None:
    """Name of the first layer whose output is not finite while `run` runs, None if all are.

    `names` has the layers' names under the paths of their modules.
    """
    found: list[str] = []

    def hook(name: str) -> Any:
        def forward(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            if not found and not bool(torch.isfinite(output).all()):
                found.append(name)

        return forward

    handles = [
        model.get_submodule(path).register_forward_hook(hook(name)) for path, name in names.items()
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
