"""Where tensors are computed on, and what to say where there is no room for them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import RLock

import torch

from gradpipe.errors import GradpipeError, InputError, did_you_mean

ONE_THREAD = RLock()  # held while what all threads share is changed: transformers does, as it loads
_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # quota and period
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # torch's own words


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where present, else the CPU. Raises InputError for a device that is not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # `meta` is a device, and holds no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        near = did_you_mean(name, ("auto", "cpu", "cuda"))
        raise InputError(
            f"--device {name}: no such device here: expected auto, cpu or cuda[:N]{near}"
        ) from error
    return device


def usable_threads() -> int:
    """Cores for this process: as many as torch would use, its affinity and its cgroup allow.

    Torch takes what OMP_NUM_THREADS says, even where there are fewer cores.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    cores = len(affinity(0)) if affinity else torch.get_num_threads()
    return min(torch.get_num_threads(), cores, _quota() or cores)


def _quota() -> int | None:
    """Whole cores that this process's cgroup has the time of, at least one; None: no limit."""
    try:
        quota, period = _CPU_LIMIT.read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or `max`
        return None


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch with so many threads for one operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def own_torch() -> Iterator[None]:
    """Torch as a process of our own has it, whatever a notebook has set: its default type, say."""
    with ONE_THREAD:
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(mode=False),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            nullcontext() if device.type == "cpu" else torch.device("cpu"),
        ):
            yield
    finally:
        with ONE_THREAD:
            torch.set_default_dtype(dtype)


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
