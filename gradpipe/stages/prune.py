"""One layer of stage two: decode its statistics, score it once, mask it for every target.

And the file that it goes to: `rewrite` copies a safetensors file byte for byte, but for the
tensors that it is given.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from gradpipe.errors import GradpipeError
from gradpipe.stages.checkpoint import TensorInfo, tensor_bytes
from gradpipe.stages.decode import decode_norms
from gradpipe.stages.mask import Group, Pattern, exact_sparsity, pattern_mask, unstructured_mask
from gradpipe.stages.score import METHODS, Norms
from gradpipe.store.codec import Encoded

_COPY_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """One checkpoint to be written: a sparsity, or an n:m pattern."""

    sparsity: float
    pattern: Pattern | None = None

    @property
    def label(self) -> str:
        """Folder name when there are several: `s0.50`, `2-4`."""
        if self.pattern is not None:
            return f"{self.pattern.n}-{self.pattern.m}"
        return (
            f"s{self.sparsity:.2f}"
            if round(self.sparsity, 2) == self.sparsity
            else f"s{self.sparsity!r}"
        )

    @property
    def exact(self) -> Fraction:
        """The share of weights that go."""
        return exact_sparsity(self.sparsity) if self.pattern is None else self.pattern.sparsity

    def mask(self, score_OI: Tensor, group: Group) -> Tensor:
        """True = kept, (O, I)."""
        if self.pattern is not None:
            return pattern_mask(score_OI, self.pattern)
        return unstructured_mask(score_OI, self.exact, group)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to score and compare."""

    method: str
    grad_norm: str
    alpha: float
    group: Group

    @property
    def statistics(self) -> tuple[str, ...]:
        """What the method reads."""
        return METHODS[self.method].statistics(self.grad_norm)


def norms_on(
    encoded: Mapping[str, Encoded], statistics: Iterable[str], device: torch.device
) -> Norms:
    """Move codes to the device, and decode there what the method needs of them."""
    return Norms(
        values={name: decode_norms(encoded, name, device) for name in statistics},
        num_samples={name: item.spec.num_samples for name, item in encoded.items()},
    )


def prune_layer(
    name: str,
    weight: Tensor,
    norms: Norms,
    recipe: Recipe,
    targets: Sequence[Target],
    *,
    transposed: bool,
) -> Iterator[Tensor]:
    """The pruned weight for each target in turn, on the CPU, as the checkpoint keeps it.

    Raises GradpipeError if a score is not a number.
    """
    weight_OI = weight.T if transposed else weight
    score_OI = METHODS[recipe.method].score(weight_OI, norms, recipe.grad_norm, recipe.alpha)
    if not bool(torch.isfinite(score_OI).all()):
        raise GradpipeError(
            f"layer {name}: a {recipe.method} score is NaN or infinite, "
            "as its weights or its statistics are"
        )
    for target in targets:
        pruned_OI = weight_OI.masked_fill(~target.mask(score_OI, recipe.group), 0.0)
        yield (pruned_OI.T if transposed else pruned_OI).contiguous().cpu()


def rewrite(
    source: Path, outputs: Sequence[Path], replaced: Iterable[tuple[TensorInfo, Iterable[Tensor]]]
) -> None:
    """Copy a safetensors file to each output, with some tensors replaced, and make it durable.

    `replaced` comes in file order: each tensor's place and one new value for each output.
    """
    with ExitStack() as stack:
        reader = stack.enter_context(source.open("rb"))
        writers = [stack.enter_context(path.open("wb")) for path in outputs]
        for info, tensors in replaced:
            _copy(reader, writers, info.start - reader.tell())
            for writer, tensor in zip(writers, tensors, strict=True):
                writer.write(tensor_bytes(tensor))
            reader.seek(info.stop)
        _copy(reader, writers, source.stat().st_size - reader.tell())
        for writer in writers:
            writer.flush()
            os.fsync(writer.fileno())


def _copy(reader: BinaryIO, writers: Sequence[BinaryIO], num_bytes: int) -> None:
    """Copy the next bytes to every writer."""
    while num_bytes:
        data = reader.read(min(num_bytes, _COPY_BYTES))
        if not data:
            raise GradpipeError(f"{reader.name} became shorter while it was copied")
        for writer in writers:
            writer.write(data)
        num_bytes -= len(data)
