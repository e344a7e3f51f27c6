"""What must hold of a pruned tensor's values, alone and beside the dense model's.

Values are compared as bits: −0.0 equals 0.0 to arithmetic, and is not the zero that pruning writes.
"""

import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; of a tensor without values too."""
    return bool(torch.isfinite(tensor).all())


def count_negative_zeros(tensor: Tensor, dense: Tensor) -> int:
    """How many values are −0.0, but for those that are so in `dense` as well."""
    return int((_is_negative_zero(tensor) & ~_is_negative_zero(dense)).sum())


def count_changed(tensor: Tensor, dense: Tensor) -> int:
    """How many values are neither zero nor those of `dense`, bit for bit."""
    return int(((tensor != 0) & (_bits(tensor) != _bits(dense))).sum())


def has_pattern(matrix: Tensor, n: int, m: int) -> bool:
    """Whether at most `n` of every `m` values are not zero, along the rows or the columns.

    Checkpoints keep a layer as (out, in), or as (in, out); the inputs are what a pattern runs
    along. Values with the pattern along one side have it along the other by chance alone.
    """
    kept = matrix != 0
    return any(
        side.shape[1] % m == 0 and bool((side.reshape(-1, m).sum(1) <= n).all())
        for side in (kept, kept.T)
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_BITS[tensor.element_size()])


def _is_negative_zero(tensor: Tensor) -> Tensor:
    bits = _bits(tensor)
    return bits == torch.iinfo(bits.dtype).min
