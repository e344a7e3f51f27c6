"""The adapter between gradpipe and any transformers model: load it, find its blocks and layers.

No table of architectures: the blocks are the module list that holds most of the model's
parameters, and a layer is a linear map inside one. `--blocks` names the list by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as hf_logging

from gradpipe.errors import InputError
from gradpipe.stages.checkpoint import Checkpoint, matrix_shape
from gradpipe.store.objects import digest
from gradpipe.store.schema import LayerSpec

_MAX_SEQ_LEN = 2048  # the literature's window
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One prunable linear map of a loaded model."""

    spec: LayerSpec
    module: nn.Module


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The repeated blocks of a loaded model, in order, with their path (`model.layers`)."""

    path: str
    modules: tuple[nn.Module, ...]


def sequence_length(asked: int | None, checkpoint: Checkpoint) -> int:
    """`asked`, or 2048 capped by the model's positions; InputError if the model has fewer."""
    config = AutoConfig.from_pretrained(checkpoint.folder).get_text_config()
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if asked is not None and limit is not None and asked > limit:
        raise InputError(
            f"--seq-len {asked}: {checkpoint.name} has {limit} positions: give at most that"
        )
    return asked or min(_MAX_SEQ_LEN, limit or _MAX_SEQ_LEN)


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer; InputError if it has none."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"{checkpoint.name}: cannot load its tokenizer: {_first_line(error)}"
        ) from error


def load_model(checkpoint: Checkpoint, dtype: str, device: torch.device) -> Any:
    """The causal language model, in eval mode, every weight frozen.

    `dtype` is `auto` (the checkpoint's own) or a key of `DTYPES`. Remote code is never run.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: expected auto or one of {', '.join(DTYPES)}")
    try:
        with _no_loading_bar():
            model: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder, dtype=DTYPES.get(dtype, "auto"), use_safetensors=True
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"{checkpoint.name}: transformers cannot load it as a causal language model: "
            f"{_first_line(error)}"
        ) from error
    return model.to(device).eval().requires_grad_(requires_grad=False)


@contextmanager
def _no_loading_bar() -> Iterator[None]:
    """Silence transformers' own bar, which does not look whether it is on a terminal."""
    was_on = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            hf_logging.enable_progress_bar()


def find_blocks(model: nn.Module, path: str | None = None) -> Blocks:
    """The repeated blocks: those at `path`, else the largest list of modules of one class.

    Raises InputError that says what was looked for.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and _is_block_list(module)
    }
    if path is not None:
        if path not in lists:
            raise InputError(
                f"--blocks {path}: expected the path of a list of blocks with linear layers; "
                f"this model has {', '.join(lists) or 'none'}"
            )
        return Blocks(path=path, modules=tuple(lists[path]))
    if not lists:
        raise InputError(
            f"no blocks found in {type(model).__name__}: looked for an nn.ModuleList whose "
            "modules share one class and hold linear layers; name its path with --blocks PATH"
        )
    largest = max(lists, key=lambda name: _num_parameters(lists[name]))
    return Blocks(path=largest, modules=tuple(lists[largest]))


def find_layers(
    model: nn.Module, blocks: Blocks, checkpoint: Checkpoint, include: tuple[str, ...] = ()
) -> tuple[Layer, ...]:
    """Every linear map in the blocks, and those outside whose name matches an `include` regex.

    Each is tied to its tensor in the checkpoint. Raises InputError for one that has none.
    """
    prefix = blocks.path + "."
    layers = []
    for name, module in model.named_modules():
        if not is_linear(module):
            continue
        inside = name.startswith(prefix)
        if not inside and not any(re.search(pattern, name) for pattern in include):
            continue
        block = int(name.removeprefix(prefix).split(".")[0]) if inside else None
        layers.append(Layer(spec=_layer_spec(name, module, block, checkpoint), module=module))
    return tuple(layers)


def is_linear(module: nn.Module) -> bool:
    """True for the modules whose `weight` is one matrix applied to the last dimension."""
    return isinstance(module, nn.Linear | Conv1D)


def _layer_spec(
    name: str, module: nn.Module, block: int | None, checkpoint: Checkpoint
) -> LayerSpec:
    transposed = isinstance(module, Conv1D)
    weight = module.get_parameter("weight")
    shape = tuple(weight.shape)[::-1] if transposed else tuple(weight.shape)
    key = _weight_key(name, checkpoint)
    if matrix_shape(checkpoint.tensors[key], transposed=transposed) != shape:
        raise InputError(
            f"layer {name}: the model holds {shape}, the checkpoint {key} differs in shape"
        )
    return LayerSpec(
        name=key.removesuffix(".weight"),
        weight_key=key,
        shape=shape,
        block=block,
        transposed=transposed,
        digest=digest(checkpoint.read_bytes(key)),
    )


def _weight_key(name: str, checkpoint: Checkpoint) -> str:
    """The checkpoint's key of a module's weight.

    Checkpoints may be saved from the headless model (GPT-2's `h.0…` for `transformer.h.0…`), so
    the longest tail of the name that one tensor alone bears is taken. A tied head has no tensor
    of its own: it is the input embedding's.
    """
    steps = [*name.split("."), "weight"]
    if ".".join(steps) in checkpoint.tensors:
        return ".".join(steps)
    for start in range(len(steps) - 1):
        tail = ".".join(steps[start:])
        matches = [k for k in checkpoint.tensors if k == tail or k.endswith("." + tail)]
        if len(matches) == 1:
            return matches[0]
    embeddings = [
        k
        for k in checkpoint.tensors
        if re.search(r"(embed_tokens|wte|embed_in|word_embeddings)\.weight$", k)
    ]
    if checkpoint.config.get("tie_word_embeddings", True) and len(embeddings) == 1:
        return embeddings[0]
    raise InputError(f"layer {name}: no tensor of {checkpoint.name} is its weight")


def _is_block_list(modules: nn.ModuleList) -> bool:
    kinds = {type(module) for module in modules}
    return len(kinds) == 1 and any(is_linear(m) for m in modules[0].modules())


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
