"""Which tensor of the checkpoint is behind each of the model's parameters, whatever their names."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from gradpipe.errors import InputError
from gradpipe.stages.checkpoint.folder import Checkpoint


def weight_keys(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """The checkpoint's tensor behind each of the model's parameters and persistent buffers.

    A checkpoint may be saved from the headless model (GPT-2's `h.0…` for `transformer.h.0…`), so
    the longest tail of the name that one tensor alone bears is taken, its block's number included.
    A tied parameter has the tensor of the one it is tied to; what is left goes by shape, where
    that leaves no choice (GPT-NeoX's head). Raises InputError for a parameter without a tensor.
    """
    tails: dict[str, list[str]] = {}
    for tensor, name in _new_names(model, checkpoint).items():
        steps = name.split(".")
        for start in range(len(steps)):
            tails.setdefault(".".join(steps[start:]), []).append(tensor)
    stored = dict(model.state_dict(keep_vars=True))
    keys = {n: key for n in stored if (key := _by_tail(n, tails, checkpoint)) is not None}
    by_identity = {id(stored[n]): key for n, key in keys.items()}
    unclaimed = set(checkpoint.tensors) - set(keys.values())
    for name in sorted(stored.keys() - keys.keys()):
        shape = tuple(stored[name].shape)
        alike = [key for key in unclaimed if checkpoint.tensors[key].shape == shape]
        if id(stored[name]) in by_identity:
            keys[name] = by_identity[id(stored[name])]
        elif len(alike) == 1:
            keys[name] = alike[0]
    if missing := sorted(stored.keys() - keys.keys()):
        raise InputError(
            f"{checkpoint.name} lacks {len(missing)} tensors that its config.json asks for, "
            f"first {missing[0]}: fetch it again"
        )
    _check_shapes(keys, stored, checkpoint)
    return keys


def _new_names(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """Each tensor's name as transformers spells it now.

    ViT's `encoder.layer.0` is `layers.0`, Mixtral's `block_sparse_moe` is `mlp`.
    """
    known = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
    renamings = [rule for rule in known if isinstance(rule, WeightRenaming)]
    return {key: rename_source_key(key, renamings, [])[0] for key in checkpoint.tensors}


def _by_tail(name: str, tails: dict[str, list[str]], checkpoint: Checkpoint) -> str | None:
    if name in checkpoint.tensors:
        return name
    steps = name.split(".")
    number = next((i for i, step in enumerate(steps) if step.isdecimal()), len(steps) - 2)
    found = (tails.get(".".join(steps[start:]), []) for start in range(1, number + 1))
    return next((keys[0] for keys in found if len(keys) == 1), None)


def _check_shapes(keys: dict[str, str], stored: dict[str, Any], checkpoint: Checkpoint) -> None:
    for name, key in sorted(keys.items()):
        shape, expected = checkpoint.tensors[key].shape, tuple(stored[name].shape)
        if shape != expected:
            raise InputError(
                f"{checkpoint.name}: tensor {key} is {shape}, by its config.json {expected}: "
                "weights and config.json are of different models"
            )
