"""Second moments too wide to be decomposed: refused, or told of before hours go by.

A decomposition of N x N takes about 9 N³ operations: measured, 52 to 72 a nanosecond on one core
for N of 512 to 2,048, so that 28,672, the inner width of a Llama of 70 B parameters, takes the
better part of an hour. LAPACK counts the 1 + 6 N + 2 N² values of its workspace (`ssyevd`) in 32
bits: beyond 32,766 it ends the process.
"""

from collections.abc import Iterable

import torch

from gradpipe.errors import InputError
from gradpipe.stages.prune.methods import ChosenMethod
from gradpipe.store.schema import LayerSpec
from gradpipe.store.statistics import STATISTICS

_WIDEST_ON_CPU = 32766
_LONG = 16384  # from here on a core takes ten minutes or more
_OPERATIONS_A_MINUTE = 60 * 60e9


def check_decompositions(
    layers: Iterable[LayerSpec], method: str, chosen: ChosenMethod, device: torch.device
) -> str | None:
    """What to say of second moments that take long to decompose, None if none does.

    Raises InputError for a layer whose are beyond what a CPU's LAPACK can decompose.
    """
    if not chosen.method.decomposes or device.type != "cpu":
        return None
    moments = [STATISTICS[x] for x in chosen.second_moments]
    width, name = max((x.sum_shape(y.shape)[0], y.name) for y in layers for x in moments)
    if width < _LONG:
        return None
    what = f"layer {name}: its second moments are {width} x {width}, and {method}"
    instead = "--method gblm --update lsq --curvature kfac, which decomposes nothing"
    if width > _WIDEST_ON_CPU:
        raise InputError(
            f"{what} decomposes them, which a CPU can up to {_WIDEST_ON_CPU}: use --device cuda, "
            f"or {instead}"
        )
    minutes = 9 * width**3 / _OPERATIONS_A_MINUTE
    return f"{what} takes about {minutes:.0f} minutes of a core for each: or {instead}"
