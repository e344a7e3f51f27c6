"""Buffers that no checkpoint holds: rotary frequencies, embedding scales, masks of zeros.

`from_pretrained` builds a model without values and lets each part fill in its own buffers
afterwards, as its class says. The same is done here. What nothing fills in would keep whatever
was in memory before: every buffer is filled in twice, over zeros and over ones, and must come out
the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradpipe.errors import InputError
from gradpipe.stages.checkpoint.folder import Checkpoint


def fill_buffers(model: Any, checkpoint: Checkpoint, stored: frozenset[str]) -> None:
    """Real values for the buffers of a model on the meta device, but for those in `stored`.

    Raises InputError for one that the model's own code leaves as it was.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor._is_hf_initialized = name in stored  # noqa: SLF001 (transformers passes it by)
    names = [name for name, _ in model.named_buffers() if name not in stored]
    over_zeros, over_ones = (_filled(model, names, fill) for fill in (0, 1))
    for name in names:
        if not torch.equal(over_zeros[name], over_ones[name]):
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            raise InputError(
                f"{checkpoint.name}: nothing fills in {name}: {owner} in transformers leaves it "
                "with what was in memory, so that no two runs would agree: report it there"
            )


@torch.no_grad()
def _filled(model: Any, names: list[str], fill: int) -> dict[str, Tensor]:
    """The buffers as the model's classes fill them, `fill` having been there before."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        buffers = model.get_submodule(owner)._buffers  # noqa: SLF001 (keeps it persistent or not)
        buffers[leaf] = torch.full_like(buffers[leaf], fill, device="cpu")
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    with torch.random.fork_rng(devices=[]):
        model.initialize_weights()
    return {name: model.get_buffer(name).clone() for name in names}
