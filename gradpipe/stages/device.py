"""Where tensors are computed on."""

from __future__ import annotations

import torch

from gradpipe.errors import InputError


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where present, else the CPU. Raises InputError for a device that is not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # `meta` is a device, and holds no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"--device {name}: no such device here: expected auto, cpu or cuda[:N]"
        ) from error
    return device
