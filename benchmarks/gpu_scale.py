"""How large the jobs of `benchmarks/gpu_check.py` are: for one H100, or as toys on any CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from benchmarks.random_llama import LlamaSize


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The sizes of all jobs."""

    compared: LlamaSize  # collected on the CPU and on the device, and held against each other
    solved: tuple[int, int]  # a layer that both solve, (out, in)
    collected: LlamaSize  # timed against a bare forward and backward
    seq_len: int
    resident_samples: int
    streamed_samples: int
    block: LlamaSize  # one block of a LLaMA-2-7B
    depth: int  # how many such blocks the model has
    tokens: tuple[int, ...]  # of one product by a 2:4 weight: decoding, and reading a prompt
    repeats: int


FULL: Final = Scale(
    compared=LlamaSize(hidden=256, blocks=2, intermediate=688, heads=8, vocab=512),
    solved=(512, 1024),
    collected=LlamaSize(  # 1.35 B parameters
        hidden=2048, blocks=24, intermediate=5504, heads=16, vocab=32000, dtype="bfloat16"
    ),
    seq_len=2048,
    resident_samples=4,
    streamed_samples=32,
    block=LlamaSize(
        hidden=4096, blocks=1, intermediate=11008, heads=32, vocab=512, dtype="bfloat16"
    ),
    depth=32,
    tokens=(1, 16, 2048),
    repeats=5,
)

TOY: Final = Scale(
    compared=LlamaSize(hidden=32, blocks=1, intermediate=64, heads=2, vocab=300),
    solved=(16, 32),
    collected=LlamaSize(hidden=32, blocks=2, intermediate=64, heads=2, vocab=300),
    seq_len=16,
    resident_samples=2,
    streamed_samples=2,
    block=LlamaSize(hidden=64, blocks=1, intermediate=128, heads=2, vocab=300),
    depth=2,
    tokens=(1, 16),
    repeats=1,
)
SCALES: Final = {"full": FULL, "toy": TOY}
