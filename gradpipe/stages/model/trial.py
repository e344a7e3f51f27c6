"""A forward pass without values: what of a model runs on its samples, and what each part reads.

On the meta device tensors have shapes and no values, so the pass costs next to nothing for a model
of any size. It goes back as well, to see what gradients come to. A model whose control flow asks
for values stops half-way; what has run until then is known.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradpipe.errors import class_and_line

_TOKENS = 4
_IMAGE_SIZE = 224  # of models that take any


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a pass was seen to run."""

    times: Mapping[str, int]  # path of each module that ran, in that order -> how often it did
    shapes: Mapping[str, tuple[int, ...]]  # of the tensor that a module reads first
    reads: Mapping[str, str]  # module -> the first one that reads the very same tensor
    reached: frozenset[str]  # parameters that a gradient of the logits comes to
    mixed: frozenset[str]  # modules whose input does not grow along its first axis with samples
    error: str | None  # what stopped it; None: it went through, and back


def try_forward(model: Any) -> Trial:
    """Run the skeleton on no values; of several ways to call it, the one that got furthest."""
    on_meta = copy.deepcopy(model).to("meta")
    for parameter in on_meta.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for module in on_meta.modules():
        if hasattr(module, "is_concatenated"):  # fused experts: which get a token is a value
            module.config._experts_implementation = "batched_mm"  # noqa: SLF001
    trials = []
    for one, two in zip(attempts(model, 1), attempts(model, 2), strict=True):
        trials.append(_try(on_meta, one, two))
        if trials[-1].error is None:
            return trials[-1]
    return max(trials, key=lambda trial: len(trial.times))


def _try(model: Any, one: Mapping[str, Any], two: Mapping[str, Any]) -> Trial:
    """Forward and back on one sample, then forward on two."""
    alone: dict[str, list[Any]] = {}  # path of each module that ran -> what it read, held
    pair: dict[str, list[Any]] = {}
    error = None
    try:
        with _noted(model, alone):
            model(**one).logits.sum().backward()
        with _noted(model, pair), torch.no_grad():
            model(**two)
    except Exception as raised:  # noqa: BLE001 (a model's code raises what it likes)
        error = class_and_line(raised)
    parameters = model.named_parameters(remove_duplicate=False)
    reached = frozenset(name for name, x in parameters if x.grad is not None)
    model.zero_grad()
    first = {path: read[0] for path, read in alone.items() if isinstance(read[0], Tensor)}
    readers: dict[int, str] = {}
    return Trial(
        times={path: len(read) for path, read in alone.items()},
        shapes={path: tuple(tensor.shape) for path, tensor in first.items()},
        reads={path: readers.setdefault(id(tensor), path) for path, tensor in first.items()},
        reached=reached,
        mixed=frozenset(x for x in alone if x in pair and _lengths(alone[x]) == _lengths(pair[x])),
        error=error,
    )


@contextmanager
def _noted(model: nn.Module, read: dict[str, list[Any]]) -> Iterator[None]:
    """Meanwhile, what each module reads first, under all of its paths."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)

    def note(called: nn.Module, arguments: tuple[Any, ...]) -> None:
        for path in paths[called]:
            read.setdefault(path, []).append(arguments[0] if arguments else None)

    with ExitStack() as hooks:
        for module in paths:
            hooks.enter_context(module.register_forward_pre_hook(note))
        yield


def _lengths(read: Iterable[Any]) -> list[torch.Size]:
    """How long the first axis is of each."""
    return [x.shape[:1] if isinstance(x, Tensor) else torch.Size() for x in read]


def image_shape(model: Any) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a model takes, by its config."""
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", _IMAGE_SIZE)
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), height, width


def attempts(model: Any, num_samples: int) -> tuple[Mapping[str, Any], ...]:
    """What to call a model with.

    Most language models need a ready mask not to look into it; a few build theirs without looking.
    """
    if model.main_input_name == "pixel_values":
        return ({"pixel_values": torch.zeros(num_samples, *image_shape(model), device="meta")},)
    ids_BT = torch.zeros(num_samples, _TOKENS, dtype=torch.long, device="meta")
    mask_B1TT = torch.zeros(num_samples, 1, _TOKENS, _TOKENS, device="meta")
    text = {"input_ids": ids_BT, "use_cache": False}
    return (text, text | {"attention_mask": mask_B1TT})
