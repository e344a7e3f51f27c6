"""Load a transformers model, its tokenizer and its config; or its skeleton, without weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.core_model_loading import build_glob_alternation, revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging as hf_logging

from gradpipe.errors import GradpipeError, InputError, did_you_mean
from gradpipe.stages.checkpoint.folder import Checkpoint, check_unquantized
from gradpipe.stages.checkpoint.tensors import FLOAT_TYPES, TensorInfo
from gradpipe.stages.device import ONE_THREAD, is_out_of_memory
from gradpipe.stages.model.buffers import fill_buffers
from gradpipe.stages.model.conversion import Sources, find_sources, missing_weights
from gradpipe.stages.model.tasks import auto_class, noun

_MAX_SEQ_LEN = 2048  # the literature's window
_TOKENIZER_FILES = ("tokenizer.*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def sequence_length(asked: int | None, checkpoint: Checkpoint) -> int:
    """`asked`, or 2048 capped by the model's positions; InputError if the model has fewer."""
    config = _read_config(checkpoint)
    with _loading(checkpoint):
        limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    limit = limit if limit and limit > 0 else None  # XLNet says -1: any number
    if asked is not None and limit is not None and asked > limit:
        raise InputError(
            f"--seq-len {asked}: {checkpoint.name} has {limit} positions: give at most that"
        )
    return asked or min(_MAX_SEQ_LEN, limit or _MAX_SEQ_LEN)


def _read_config(checkpoint: Checkpoint) -> Any:
    """`config.json` as transformers understands it. Remote code is never run."""
    _check_known(checkpoint)
    try:
        with _silence():
            return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except Exception as error:  # each config has validators of its own
        raise InputError(
            f"{checkpoint.name}: transformers cannot read its config.json: {_first_line(error)}"
        ) from error


def _check_known(checkpoint: Checkpoint) -> None:
    """Raises InputError for a model that transformers has no class for: it may bring code along."""
    kind = checkpoint.config.get("model_type")
    if isinstance(kind, str) and kind not in CONFIG_MAPPING:
        own = ", and its own code (auto_map) is never run"
        raise InputError(
            f"{checkpoint.name}: transformers {transformers.__version__} cannot read its "
            f"config.json: it has no model_type {kind}"
            + (own if checkpoint.config.get("auto_map") else "")
            + ": take a newer transformers, or convert the model to a class that it has"
        )


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer; InputError if it has none, which transformers might make up."""
    if not any(any(checkpoint.folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise InputError(
            f"{checkpoint.name} has no tokenizer, such as tokenizer.json: copy it from the model "
            "that this one was made of"
        )
    try:
        with _silence():
            return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raise from many families, in Python and in Rust
        raise InputError(
            f"{checkpoint.name}: cannot load its tokenizer ({_first_line(error)}): install what it "
            "needs, or mend its files, such as tokenizer.json"
        ) from error


def check_tokens(ids: npt.NDArray[np.integer[Any]], checkpoint: Checkpoint, model: Any) -> None:
    """Refuse token ids that the model has no embedding for."""
    size = model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= size:
        raise InputError(
            f"{checkpoint.name}: the text holds token {ids.max()}, the embedding has {size}: its "
            "tokenizer, or the file of tokens, belongs to another model"
        )


def resolve_dtype(asked: str, checkpoint: Checkpoint) -> torch.dtype:
    """`auto` is the checkpoint's own: its config's dtype, else its first weight's.

    The first by its name, as transformers has it: a file begins with the widest type. float64 is
    computed in float32: sums are no finer.
    """
    if asked != "auto":
        if asked not in DTYPES:
            near = did_you_mean(asked, ("auto", *DTYPES))
            raise InputError(f"--dtype {asked}: expected auto or one of {', '.join(DTYPES)}{near}")
        return DTYPES[asked]
    name = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if isinstance(name, str) and name in DTYPES:
        return DTYPES[name]
    in_order = sorted(checkpoint.tensors.values(), key=lambda x: (x.file, x.key))
    kinds = [FLOAT_TYPES[x.dtype] for x in in_order if x.dtype in FLOAT_TYPES]
    if not kinds:
        raise InputError(f"{checkpoint.name} holds no float weights: give --dtype")
    return torch.float32 if kinds[0] is torch.float64 else kinds[0]


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def build_skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[Any, Sources]:
    """The model on the meta device, in eval mode, frozen, its buffers real; what it is made from.

    It costs no memory and reads no weights. Remote code is never run. InputError if the
    checkpoint's weights are quantized, or are not the model's.
    """
    check_unquantized(checkpoint)
    config = _read_config(checkpoint)
    with _loading(checkpoint):
        with torch.device("meta"):
            model: Any = auto_class(checkpoint).from_config(
                config, dtype=dtype, trust_remote_code=False
            )
        model.tie_weights()
        _keep_wide(model, dtype)
    sources = find_sources(model, checkpoint)
    fill_buffers(model, checkpoint, frozenset(sources.by_name))
    return _frozen(model), sources


def _keep_wide(model: Any, dtype: torch.dtype) -> None:
    """Give what transformers keeps in float32 whatever is asked for that type."""
    plan = model._get_dtype_plan(dtype)  # noqa: SLF001 (from_pretrained's way)
    if plan:
        pattern = build_glob_alternation(list(plan))[0]
        for name, tensor in model.state_dict(keep_vars=True).items():
            if pattern.search(name) and tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.float32)


def _check_method(checkpoint: Checkpoint, quantization: Any) -> None:
    """Raises InputError for a quantization that transformers would pass by, and read the codes."""
    with _loading(checkpoint):  # it raises if no method is named
        is_known = AutoHfQuantizer.supports_quant_method(quantization)
    if not is_known:
        raise InputError(
            f"{checkpoint.name}: transformers does not know the quantization_config in its "
            "config.json: give the model before it was quantized"
        )


def with_expected_tensors(outline: Checkpoint) -> Checkpoint:
    """The checkpoint that `config.json` promises: tensors as transformers would save them.

    They have names, types and shapes, and lie in no file.
    """
    check_unquantized(outline)
    config = _read_config(outline)
    with _loading(outline):
        with torch.device("meta"):
            model: Any = auto_class(outline).from_config(config, trust_remote_code=False)
        saved = revert_weight_conversion(model, model.state_dict())
    types = {dtype: name for name, dtype in FLOAT_TYPES.items()}
    tensors = {
        key: TensorInfo(
            key=key,
            file="",
            dtype=types.get(tensor.dtype, ""),
            shape=tuple(tensor.shape),
            start=0,
            stop=0,
        )
        for key, tensor in saved.items()
    }
    return replace(outline, tensors=tensors)


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    device_map: Mapping[str, str] | None = None,
) -> Any:
    """The model with its weights, in eval mode, frozen. No remote code is run.

    It is on one `device`, or as a `device_map` of accelerate's says, with hooks that move inputs.
    InputError if transformers cannot load it, or would not decode what is quantized.
    """
    if quantization := checkpoint.config.get("quantization_config"):
        _check_method(checkpoint, quantization)
    with _loading(checkpoint):
        loaded: Any = auto_class(checkpoint).from_pretrained(
            checkpoint.folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            device_map=device_map,
            ignore_mismatched_sizes=not quantization,  # they are refused below, by name
        )
    model, report = loaded
    if not quantization:
        find_sources(model, checkpoint)  # the verdict of the other schedule
    if missing := report["missing_keys"]:
        raise missing_weights(checkpoint, type(model).__name__, missing)
    return _frozen(model if device_map else model.to(device))


def _frozen(model: Any) -> Any:
    """Ready to be measured: its loss the tokens' alone, not the balance of a mixture's router."""
    with _silence():  # transformers says of some models, as GPT-2, that they have no loss's name
        model.loss_function = model.loss_function
    if getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = False
    return model.eval().requires_grad_(requires_grad=False)


@contextmanager
def _loading(checkpoint: Checkpoint) -> Iterator[None]:
    """Raise InputError for what transformers cannot build."""
    try:
        with ONE_THREAD, _silence():
            yield
    except Exception as error:  # each model's code raises what it likes
        if isinstance(error, GradpipeError) or is_out_of_memory(error):
            raise
        raise InputError(
            f"{checkpoint.name}: transformers cannot load it as {noun(checkpoint)}: "
            f"{_first_line(error)}"
        ) from error


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


def _first_line(error: BaseException) -> str:
    """What an error says first; libraries write paragraphs."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
