"""A forward pass without values: which parts of a model run on the samples that it will be given.

On the meta device tensors have shapes and no values, so the pass costs next to nothing for a model
of any size. It goes back as well, to see what gradients come to. A model whose control flow asks
for values stops half-way; what has run until then is known.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_TOKENS = 4
_IMAGE_SIZE = 224  # of models that take any


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a pass was seen to run."""

    times: Mapping[str, int]  # path of each module that ran -> how often it did
    reached: frozenset[str]  # parameters that a gradient of the logits comes to
    mixed: frozenset[str]  # modules whose input does not grow along its first axis with samples
    error: str | None  # what stopped it; None: it went through, and back

    def runs(self, path: str) -> bool:
        """Whether the module was called."""
        return path in self.times


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
    alone: dict[nn.Module, list[int]] = {}  # of each module that ran, the lengths of its inputs
    pair: dict[nn.Module, list[int]] = {}
    error = None
    try:
        with _noted(model, alone):
            model(**one).logits.sum().backward()
        with _noted(model, pair), torch.no_grad():
            model(**two)
    except Exception as raised:  # noqa: BLE001 (a model's code raises what it likes)
        error = f"{type(raised).__name__}: {raised}"
    paths = dict(model.named_modules(remove_duplicate=False))
    parameters = model.named_parameters(remove_duplicate=False)
    reached = frozenset(name for name, x in parameters if x.grad is not None)
    model.zero_grad()
    return Trial(
        times={path: len(alone[module]) for path, module in paths.items() if module in alone},
        reached=reached,
        mixed=frozenset(x for x, m in paths.items() if m in alone and alone[m] == pair.get(m)),
        error=error,
    )


@contextmanager
def _noted(model: nn.Module, lengths: dict[nn.Module, list[int]]) -> Iterator[None]:
    """Meanwhile, how long the first axis is of what each module reads."""

    def note(called: nn.Module, arguments: tuple[Any, ...]) -> None:
        is_read = bool(arguments) and isinstance(arguments[0], torch.Tensor)
        lengths.setdefault(called, []).append(len(arguments[0]) if is_read else 0)

    handles = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
