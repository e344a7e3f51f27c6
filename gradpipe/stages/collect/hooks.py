"""Hooks that feed each layer's input and output gradient to its accumulator.

The weights stay frozen: a forward hook keeps the input, a tensor hook on the output receives its
gradient, folds the two into the sums and lets go of both. Reading `param.grad` instead would
need a buffer per weight, mix the samples of a batch, and see reduced gradients under sharding.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Self
from weakref import ref

import torch
from torch import Tensor, nn

from gradpipe.errors import GradpipeError
from gradpipe.stages.collect.schedule import runs_twice
from gradpipe.stages.collect.sums import LayerAccumulator
from gradpipe.stages.model.experts import RoutedLinear
from gradpipe.store.schema import LayerSpec

# Gradients of a mean over thousands of tokens fall below float16's smallest number. A power of
# two is exact to multiply by and to divide out again in float32.
_FLOAT16_SCALE = 2.0**12
_FLOAT16_MOST = torch.finfo(torch.float16).max
_BySample = Callable[[Tensor], Sequence[Tensor]]


class LayerHooks:
    """A context in which one pass of the model over one batch feeds the accumulators.

    Raises GradpipeError for a layer whose gradient would not be whole: one that runs twice, or
    whose output the loss does not depend on.
    """

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
        self._hooks = ExitStack()
        self._inputs: dict[str, ref[Tensor]] = {}  # of each layer that has run in this pass
        self._waiting: dict[str, None] = {}  # layers whose output's gradient has not come yet

    def __enter__(self) -> Self:
        for path, accumulator in self._sums.items():
            hook = partial(self._after_forward, accumulator)
            module = self._model.get_submodule(path)
            self._hooks.enter_context(module.register_forward_hook(hook))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove the hooks; after a pass that went well every gradient must have come."""
        self.remove()
        if kind is None and self._waiting:
            raise GradpipeError(
                f"layer {[*self._waiting][-1]} gets no gradient: the model's loss does not depend "
                "on its output: leave it out by --exclude, or give --statistics act_l2"
            )

    def remove(self) -> None:
        """Remove the hooks: later passes add nothing."""
        self._hooks.close()

    def _after_forward(
        self, accumulator: LayerAccumulator, module: nn.Module, inputs: tuple[Any, ...], output: Any
    ) -> Tensor | None:
        """Add the inputs of a layer that has run, and have its output's gradient added."""
        name = accumulator.spec.name
        if not isinstance(output, Tensor):
            raise GradpipeError(
                f"layer {name} returns a {type(output).__name__}, expected a tensor: name blocks "
                "without it by --blocks"
            )
        self._check_input(accumulator.spec, inputs[0])
        by_sample = self._by_sample(module, inputs)
        xs_TI = by_sample(inputs[0].detach().to(output.device))  # a device map has moved them
        accumulator.add_inputs(xs_TI)
        if accumulator.needs_outputs:
            accumulator.add_outputs(by_sample(output.detach()))
        if not accumulator.needs_gradients:
            return None
        if output.numel():  # not an expert that no token went to
            self._waiting[name] = None
        if not torch.is_grad_enabled():
            return None
        tracked = _in_graph(output)
        tracked.register_hook(partial(self._after_backward, accumulator, xs_TI, by_sample))
        return tracked

    def _after_backward(
        self,
        accumulator: LayerAccumulator,
        xs_TI: Sequence[Tensor],
        by_sample: _BySample,
        gradient: Tensor,
    ) -> None:
        self._waiting.pop(accumulator.spec.name, None)
        accumulator.add_gradients(xs_TI, by_sample(gradient), self._scale)

    def _check_input(self, spec: LayerSpec, tensor: Tensor) -> None:
        """A layer runs once, and on the tensor of the layer that it shares its input with.

        A sample's gradient is one product only if the layer runs once.
        """
        if spec.name in self._inputs:
            raise GradpipeError(runs_twice(spec.name))
        self._inputs[spec.name] = ref(tensor)
        if spec.input_of is None:
            return
        first = self._inputs.get(spec.input_of)
        if first is None or first() is not tensor:
            raise GradpipeError(
                f"layer {spec.name} does not read the input of {spec.input_of}, as it did without "
                "values: leave one of them out by --exclude"
            )

    def _by_sample(self, module: nn.Module, inputs: tuple[Any, ...]) -> _BySample:
        """What takes a layer's inputs, or its output's gradient, apart: one tensor a sample."""
        if not isinstance(module, RoutedLinear):
            return self._tokens_of_samples
        routed_R, num_tokens = inputs[1:]
        sample_R = routed_R.div(num_tokens // self._num_samples, rounding_mode="floor")
        counts = torch.bincount(sample_R, minlength=self._num_samples).tolist()
        return lambda tensor_RW: tensor_RW.split(counts)

    def _tokens_of_samples(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """B of (T, width), also where the block has made it (B·T, width), as OPT's MLP does."""
        return tensor.reshape(self._num_samples, -1, tensor.shape[-1]).unbind()


def _in_graph(output: Tensor) -> Tensor:
    """The output of a layer, with a gradient to come.

    All weights are frozen, so autograd starts at the first layers that are collected: before them
    nothing requires a gradient. A copy, because what starts a graph must not be changed in place.
    """
    return output if output.requires_grad else output.requires_grad_().clone()


@contextmanager
def runs(
    model: nn.Module, paths: Iterable[str], *, in_graph: bool = False
) -> Iterator[list[tuple[str, Any]]]:
    """Meanwhile, which of the modules at these paths run, in order, and what each gives.

    Their outputs require gradients if they are to be `in_graph`.
    """
    found: list[tuple[str, Any]] = []

    def note(path: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        result = _in_graph(output) if in_graph else output
        found.append((path, result))
        return result

    with ExitStack() as hooks:
        for path in paths:
            module = model.get_submodule(path)
            hooks.enter_context(module.register_forward_hook(partial(note, path)))
        yield found


def never_ran(path: str) -> str:
    """What to say of a block that a pass does not reach."""
    return (
        f"block {path} never runs when the model is called: name the list of blocks that do by "
        "--blocks"
    )


def loss_scale(model: Any, num_samples: int) -> float:
    """What a batch's loss is multiplied by, beside its samples, before it is differentiated.

    Of text the loss is float32; of images in float16 it is float16 as well, and the whole factor
    has to be a number of that.
    """
    if model.dtype is not torch.float16:
        return 1.0
    if model.main_input_name != "pixel_values":
        return _FLOAT16_SCALE
    return min(_FLOAT16_SCALE, 2.0 ** math.floor(math.log2(_FLOAT16_MOST / num_samples)))


def check_loss(loss: Tensor, find: Callable[[], str | None]) -> None:
    """Raises GradpipeError for a loss that is not finite, with the layer that `find` blames."""
    value = float(loss.detach())
    if not math.isfinite(value):
        layer = find()
        origin = f", first in the output of layer {layer}" if layer else ""
        raise GradpipeError(
            f"the model's loss is {value}{origin}: try --dtype bfloat16 or float32, "
            "or mend the checkpoint"
        )


def first_overflow(
    model: nn.Module, names: Mapping[str, str], run: Callable[[], object]
) -> str | None:
    """Name of the first layer whose output is not finite while `run` runs, None if all are.

    `names` has the layers' names under the paths of their modules.
    """
    found: list[str] = []

    def check(name: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
            found.append(name)

    with ExitStack() as hooks, torch.no_grad():
        for path, name in names.items():
            module = model.get_submodule(path)
            hooks.enter_context(module.register_forward_hook(partial(check, name)))
        run()
    return found[0] if found else None
