"""The `resident` schedule: an ordinary forward and backward of the whole model, hooks on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradpipe.errors import GradpipeError
from gradpipe.stages.collect.hooks import LayerHooks, first_overflow
from gradpipe.stages.collect.sums import LayerAccumulator
from gradpipe.stages.model.batch import Batch
from gradpipe.stages.model.layers import Blocks

# Gradients of a mean over thousands of tokens fall below float16's smallest number. A power of
# two is exact to multiply by and to divide out again in float32.
_FLOAT16_SCALE = 2.0**12


def resident_batch(
    model: Any,
    blocks: Blocks,
    sums: Mapping[str, LayerAccumulator],
    batch: Batch,
) -> None:
    """One batch forward and, if a statistic needs it, backward.

    The loss differentiated is the model's own loss of each sample, so that a sample
    weighs the same in any batch.
    """
    num_samples = len(batch)
    backward = any(accumulator.needs_gradients for accumulator in sums.values())
    scale = loss_scale(model)
    first = model.get_submodule(blocks.paths[0])
    entry = first.register_forward_pre_hook(_require_grad, with_kwargs=True)
    names = {path: accumulator.spec.name for path, accumulator in sums.items()}
    hooks = LayerHooks(model, sums, num_samples, scale)

    def find_overflow() -> str | None:
        hooks.remove()
        return first_overflow(model, names, lambda: batch.forward(model))

    try:
        with (
            hooks,
            torch.set_grad_enabled(backward),
        ):
            loss = batch.forward(model).loss
            check_loss(loss, find_overflow)
            if backward:
                (loss * (num_samples * scale)).backward()
    finally:
        entry.remove()


def loss_scale(model: Any) -> float:
    """What the loss is multiplied by before it is differentiated."""
    return _FLOAT16_SCALE if model.dtype is torch.float16 else 1.0


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


def _require_grad(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let gradients reach the first block although every weight is frozen."""
    if not torch.is_grad_enabled():
        return None
    if args:
        return (_leaf(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _leaf(kwargs["hidden_states"])}


def _leaf(hidden_BTH: Tensor) -> Tensor:
    return hidden_BTH.detach().requires_grad_()
