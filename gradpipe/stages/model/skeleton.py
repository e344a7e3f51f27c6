"""A checkpoint's model without its weights, taken apart: what is collected, and what is not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradpipe.errors import InputError
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.model.blocks import Blocks, find_blocks
from gradpipe.stages.model.conversion import Sources
from gradpipe.stages.model.experts import split_experts
from gradpipe.stages.model.layers import Layer, LeftOut, find_layers, share_inputs
from gradpipe.stages.model.linear import linear_maps
from gradpipe.stages.model.load import build_skeleton
from gradpipe.stages.model.trial import Trial, try_forward
from gradpipe.store.schema import CouplingSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """A checkpoint's model without its weights, taken apart."""

    sources: Sources
    model: Any  # on the meta device, its buffers real
    blocks: Blocks
    trial: Trial
    layers: tuple[Layer, ...]
    left_out: tuple[LeftOut, ...]
    couplings: tuple[CouplingSpec, ...] = ()  # as far as they were asked for

    @property
    def checkpoint(self) -> Checkpoint:
        """What the model is made from."""
        return self.sources.checkpoint

    def image_tokens(self) -> int:
        """How many tokens the blocks see of an image.

        Raises InputError if a pass does not come to them, or they work on something else.
        """
        first, kind = self.blocks.paths[0], type(self.model).__name__
        if self.model.main_input_name != "pixel_values":
            raise InputError(f"{kind} reads {self.model.main_input_name}, expected an image alone")
        shape, error = self.trial.shapes.get(first), self.trial.error or ""
        if shape is None:
            says = "its code asks for values on the way" if "meta tensor" in error else error
            raise InputError(
                f"{kind}, given an image alone and without weights, does not come to its block "
                f"{': '.join(filter(None, (first, says)))}"
            )
        if len(shape) != 3:
            raise InputError(
                f"block {first} of {kind} reads {shape}, expected (images, tokens, width): name a "
                "list of blocks that work on tokens by --blocks"
            )
        return shape[1]


def take_apart(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    blocks: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Skeleton:
    """The skeleton of a checkpoint, its blocks at the path `blocks`, or found.

    Regexes `include` and `exclude` linear maps, as in `find_layers`.
    Reads no weights; the layers have no digests yet (`measured`). Raises InputError for a model
    that cannot be built from this checkpoint, or has no such blocks or layers.
    """
    model, sources = build_skeleton(checkpoint, dtype)
    split_experts(model, sources)
    linears, trial = linear_maps(model), try_forward(model)
    found = find_blocks(model, linears, trial, blocks)
    layers, left_out = find_layers(model, linears, found, sources, trial, include, exclude)
    return Skeleton(
        sources=sources,
        model=model,
        blocks=found,
        trial=trial,
        layers=share_inputs(layers, trial),
        left_out=left_out,
    )


def find_only_blocks(checkpoint: Checkpoint, dtype: torch.dtype) -> Skeleton:
    """The skeleton of a checkpoint as transformers runs it, fused experts and all, without layers.

    For what runs block by block and collects nothing. Raises InputError as `take_apart`.
    """
    model, sources = build_skeleton(checkpoint, dtype)
    trial = try_forward(model)
    blocks = find_blocks(model, linear_maps(model), trial)
    return Skeleton(
        sources=sources, model=model, blocks=blocks, trial=trial, layers=(), left_out=()
    )
