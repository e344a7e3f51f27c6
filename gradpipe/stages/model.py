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

import numpy as np
import numpy.typing as npt
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
    try:
        with _silence():
            config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    except Exception as error:  # each config has validators of its own
        raise InputError(
            f"{checkpoint.name}: transformers cannot read its config.json: {_first_line(error)}"
        ) from error
    if asked is not None and limit is not None and asked > limit:
        raise InputError(
            f"--seq-len {asked}: {checkpoint.name} has {limit} positions: give at most that"
        )
    return asked or min(_MAX_SEQ_LEN, limit or _MAX_SEQ_LEN)


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer; InputError if it has none."""
    try:
        with _silence():
            return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except Exception as error:  # so has each tokenizer, in two languages
        raise InputError(
            f"{checkpoint.name}: cannot load its tokenizer, such as tokenizer.json: "
            f"{_first_line(error)}"
        ) from error


def check_tokens(ids: npt.NDArray[np.integer[Any]], checkpoint: Checkpoint, model: Any) -> None:
    """Refuse token ids that the model has no embedding for."""
    size = model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= size:
        raise InputError(
            f"{checkpoint.name}: its tokenizer yields token {ids.max()}, its embedding has {size}: "
            "the tokenizer belongs to another model"
        )


def load_model(checkpoint: Checkpoint, dtype: str, device: torch.device) -> Any:
    """The causal language model, in eval mode, every weight frozen.

    `dtype` is `auto` (the checkpoint's own) or a key of `DTYPES`. Remote code is never run.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: expected auto or one of {', '.join(DTYPES)}")
    try:
        with _silence():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                dtype=DTYPES.get(dtype, "auto"),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"{checkpoint.name}: transformers cannot load it as a causal language model: "
            f"{_first_line(error)}"
        ) from error
    model, report = loaded
    _check_whole(checkpoint, report)
    return model.to(device).eval().requires_grad_(requires_grad=False)


def _check_whole(checkpoint: Checkpoint, report: dict[str, Any]) -> None:
    """Refuse what transformers would make up: it draws missing weights at random."""
    for key, found, expected in sorted(report["mismatched_keys"]):
        raise InputError(
            f"{checkpoint.name}: tensor {key} is {tuple(found)}, by its config.json "
            f"{tuple(expected)}: weights and config.json are of different models"
        )
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{checkpoint.name} lacks {len(missing)} tensors that its config.json asks for, "
            f"first {missing[0]}: fetch it again"
        )


@contextmanager
def _silence() -> Iterator[None]:
    """Silence what transformers writes by itself: bars, reports, advice. We say what matters."""
    was_on, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
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

    Each is tied to its tensor in the checkpoint. Raises InputError for one that has none, and for
    a regex without a match.
    """
    prefix = blocks.path + "."
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    outside = [name for name in linears if not name.startswith(prefix)]
    included = {name for pattern in include for name in _matches(pattern, outside, checkpoint)}
    layers = []
    for name, module in linears.items():
        inside = name.startswith(prefix)
        if inside or name in included:
            block = int(name.removeprefix(prefix).split(".")[0]) if inside else None
            layers.append(Layer(spec=_layer_spec(name, module, block, checkpoint), module=module))
    return tuple(layers)


def _matches(pattern: str, names: list[str], checkpoint: Checkpoint) -> list[str]:
    """The modules meant by an `include` regex, by their own name or their tensor's."""
    found = [
        name
        for name in names
        if re.search(pattern, name)
        or re.search(pattern, _weight_key(name, checkpoint).removesuffix(".weight"))
    ]
    if not found:
        raise InputError(
            f"--include {pattern}: matches no linear layer outside the blocks; "
            f"{checkpoint.name} has {', '.join(names) or 'none'}"
        )
    return found


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
    """What an error says first; libraries write paragraphs."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
