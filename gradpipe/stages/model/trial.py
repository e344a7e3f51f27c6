"""A forward pass without values: which parts of a model run on the samples that it will be given.

On the meta device tensors have shapes and no values, so the pass costs next to nothing for a model
of any size. It goes back as well, to see what gradients come to. A model whose control flow asks
for values stops half-way; what has run until then is known.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
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
    for inputs in _attempts(model):
        trials.append(_try(on_meta, inputs))
        if trials[-1].error is None:
            return trials[-1]
    return max(trials, key=lambda trial: len(trial.times))


def _try(model: Any, inputs: Mapping[str, Any]) -> Trial:
    calls: Counter[nn.Module] = Counter()
    handles = [
        module.register_forward_pre_hook(lambda called, _: calls.update([called]))
        for module in model.modules()
    ]
    error = None
    try:
        model(**inputs).logits.sum().backward()
    except Exception as raised:  # noqa: BLE001 (a model's code raises what it likes)
        error = f"{type(raised).__name__}: {raised}"
    finally:
        for handle in handles:
            handle.remove()
    paths = model.named_modules(remove_duplicate=False)
    times = {path: calls[module] for path, module in paths if module in calls}
    parameters = model.named_parameters(remove_duplicate=False)
    reached = frozenset(name for name, x in parameters if x.grad is not None)
    model.zero_grad()
    return Trial(times=times, reached=reached, error=error)


def image_shape(model: Any) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a model takes, by its config."""
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", _IMAGE_SIZE)
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), height, width


def _attempts(model: Any) -> tuple[Mapping[str, Any], ...]:
    """What to call a model with.

    Most language models need a ready mask not to look into it; a few build theirs without looking.
    """
    if model.main_input_name == "pixel_values":
        return ({"pixel_values": torch.zeros(1, *image_shape(model), device="meta")},)
    ids_BT = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    text = {"input_ids": ids_BT, "use_cache": False}
    return (text, text | {"attention_mask": torch.zeros(1, 1, _TOKENS, _TOKENS, device="meta")})
