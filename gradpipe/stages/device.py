"""Where tensors are computed on, and what to say where there is no room for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gradpipe.errors import GradpipeError, InputError

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # torch's own words


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


@contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Raises GradpipeError with a `remedy` where the memory of the device or the host runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise GradpipeError(f"out of memory: {remedy}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out: on a CPU torch has no class for it."""
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in _OUT_OF_MEMORY)
    return isinstance(error, MemoryError)
