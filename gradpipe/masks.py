"""Zeros that stay: hold a pruned model's zeros while it is trained.

    from gradpipe.masks import HoldZeros
    Trainer(model, args, train_dataset=data, callbacks=[HoldZeros()]).train()

or, in a loop of your own, `masks = find_masks(model)` before it, and `hold_zeros(model, masks)`
after each step of the optimizer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from gradpipe.errors import InputError
from gradpipe.stages.checkpoint.mask_file import MaskFile

Masks = Mapping[str, Tensor]  # by parameter; True = kept


def find_masks(model: nn.Module) -> dict[str, Tensor]:
    """Where the matrices of a model are not zero, by their names.

    A matrix without zeros has no mask, nor has one of zeros alone: it is new, as an adapter's is.
    """
    kept = {name: x.detach() != 0 for name, x in model.named_parameters() if x.ndim >= 2}
    return {name: mask for name, mask in kept.items() if mask.any() and not mask.all()}


def read_masks(path: str | Path) -> dict[str, Tensor]:
    """The masks that `pipe mask export` wrote, by the checkpoint's tensors; InputError if none."""
    file = MaskFile.open(Path(path))
    return {key: file.read(key) for key in file.shapes}


@torch.no_grad()
def hold_zeros(model: nn.Module, masks: Masks) -> None:
    """Set to zero what the masks drop; call it after each step of the optimizer.

    InputError for a mask whose name or shape is no parameter's.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != mask.shape:
            found = "none" if parameter is None else tuple(parameter.shape)
            raise InputError(
                f"a mask of {name} {tuple(mask.shape)}, and the model's parameter is {found}: give "
                "masks of this model, such as find_masks(model) before training"
            )
        parameter.masked_fill_(~mask.to(parameter.device), 0)


class HoldZeros(TrainerCallback):
    """For transformers' Trainer: `hold_zeros` after each step, with masks as they are at the start.

    Parameters must be whole where the callback runs: not sharded by FSDP or DeepSpeed ZeRO-3.
    """

    def __init__(self, masks: Masks | None = None) -> None:
        """`masks` in place of the model's own zeros, such as `read_masks` gives."""
        self._masks = masks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the masks, and put them where the weights are."""
        del args, state, control
        model: nn.Module = kwargs["model"]
        masks = find_masks(model) if self._masks is None else self._masks
        device = next(model.parameters()).device
        self._masks = {name: mask.to(device) for name, mask in masks.items()}
        hold_zeros(model, self._masks)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take back what the step did to the zeros."""
        del args, state, control
        hold_zeros(kwargs["model"], self._masks or {})
