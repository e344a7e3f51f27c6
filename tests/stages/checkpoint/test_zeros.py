"""Zeros are counted in tensors of any shape and float type."""

from __future__ import annotations

import pytest
import torch

from gradpipe.stages.checkpoint.tensors import count_zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_zeros_of_either_sign_are_counted_in_any_shape(dtype: torch.dtype) -> None:
    """Also in one value without axes, as Apertus has, and where there is none."""
    assert count_zeros(torch.tensor(0.0, dtype=dtype)) == 1
    assert count_zeros(torch.tensor(1.0, dtype=dtype)) == 0
    assert count_zeros(torch.empty(0, 3, dtype=dtype)) == 0
    assert count_zeros(torch.tensor([[0.0, -0.0, 1.0], [-1.0, 0.0, 2.0]], dtype=dtype)) == 3
