"""Buffers that no checkpoint holds: rotary frequencies, embedding scales, masks of zeros.

`from_pretrained` builds a model without values and lets each part fill in its own buffers
afterwards, as its class says. The same is done here. What nothing fills in would keep whatever
was in memory before: every buffer is filled in twice, over zeros and over ones, and must come out
the same.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import guard_torch_init_functions

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


@torch.no_grad()
def fill_padding(model: Any, name: str) -> None:
    """Do to a loaded parameter what `from_pretrained` does: some classes empty the padding's row.

    Youtu is one, whose head is tied to the embedding: its row of weights is not what the file has.
    """
    path, _, _ = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        steps = path.split(".")
        above = (model.get_submodule(".".join(steps[:end])) for end in reversed(range(len(steps))))
        owner: Any = next(x for x in above if hasattr(x, "_init_weights"))
        for parameter in module.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # noqa: SLF001
        with guard_torch_init_functions():
            owner._init_weights(module)  # noqa: SLF001 (from_pretrained's way)
