"""Couplings of models with linear attention, whose reference code works by chunks of tokens."""

import inspect
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.models.kimi_linear import modeling_kimi_linear as kimi

from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.model import stand_in
from gradpipe.stages.model.couplings import find_couplings
from gradpipe.stages.model.skeleton import Skeleton, take_apart
from gradpipe.store.schema import CouplingSpec
from tests.models.configs import tiny_config


class Largest(TorchDispatchMode):
    """Notes how many values the largest tensor has that is computed meanwhile."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As without it."""
        del types
        result = func(*args, **(kwargs or {}))
        self.found = max(self.found, result.numel() if isinstance(result, Tensor) else 0)
        return result


def traced(skeleton: Skeleton) -> tuple[tuple[CouplingSpec, ...], int]:
    """The couplings, and the size of the largest tensor."""
    with Largest() as largest:
        found = find_couplings(skeleton.model, skeleton.blocks, skeleton.layers)
    return found, largest.found


def test_a_chunk_is_one_token_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What chunks of 64 find, in a twentieth of the memory; elsewhere chunks are what they were.

    Kimi Linear compares all pairs of a chunk's tokens in each channel.
    """
    AutoModelForCausalLM.from_config(tiny_config("kimi_linear")).save_pretrained(tmp_path)
    skeleton = take_apart(Checkpoint.open(str(tmp_path)), torch.float32)
    short, most = traced(skeleton)
    chunk_size = inspect.signature(kimi.chunk_kimi_delta_attention).parameters["chunk_size"]
    assert chunk_size.default == 64
    monkeypatch.setattr(stand_in, "_short_chunks", nullcontext)
    long, most_long = traced(skeleton)
    assert short == long
    assert any(x.target.endswith("o_proj.weight") or "experts" in x.target for x in short)
    assert 20 * most < most_long
