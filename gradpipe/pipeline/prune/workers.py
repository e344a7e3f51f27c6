"""Layers side by side: threads, as reading, zstd, NumPy and torch all let go of Python's lock.

Each worker holds one layer, so that memory grows with their number and not with the model's. Torch
has one thread in each: threads that wait for each other in every product are slower than one where
the machine is busy, layers never wait for each other, and the bytes are the same for any number.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from gradpipe.stages.device import torch_threads, usable_threads

_MOST = 8  # unless the user says otherwise: beyond, disks and memory are what is waited for
_MOST_ON_GPU = 2  # one reads or writes while the other computes


def worker_count(wanted: int | None, device: torch.device) -> int:
    """How many layers are worked on at once."""
    most = _MOST if device.type == "cpu" else _MOST_ON_GPU
    return min(usable_threads(), most) if wanted is None else wanted


@contextmanager
def side_by_side(count: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads with torch on one core in each; none runs any more after it.

    What waits is dropped when an error leaves.
    """
    pool = ThreadPoolExecutor(count)
    with torch_threads(1):
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
