"""A checkpoint's model without its weights, taken apart: what is collected, and what is not."""

from dataclasses import dataclass
from typing import Any

import torch

from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.model.blocks import Blocks, find_blocks
from gradpipe.stages.model.conversion import Sources
from gradpipe.stages.model.experts import split_experts
from gradpipe.stages.model.layers import Layer, LeftOut, Selection, find_layers
from gradpipe.stages.model.linear import linear_maps
from gradpipe.stages.model.load import build_skeleton
from gradpipe.stages.model.trial import try_forward
from gradpipe.store.schema import CouplingSpec

_BLOCKS_ALONE = Selection()


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """A checkpoint's model without its weights, taken apart."""

    sources: Sources
    model: Any  # on the meta device, its buffers real
    blocks: Blocks
    layers: tuple[Layer, ...]
    left_out: tuple[LeftOut, ...]
    couplings: tuple[CouplingSpec, ...] = ()  # as far as they were asked for

    @property
    def checkpoint(self) -> Checkpoint:
        """What the model is made from."""
        return self.sources.checkpoint


def take_apart(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    blocks: str | None = None,
    asked: Selection = _BLOCKS_ALONE,
) -> Skeleton:
    """The skeleton of a checkpoint, its blocks at the path `blocks`, or found.

    Reads no weights; the layers have no digests yet (`measured`). Raises InputError for a model
    that cannot be built from this checkpoint, or has no such blocks or layers.
    """
    model, sources = build_skeleton(checkpoint, dtype)
    split_experts(model, sources)
    linears, trial = linear_maps(model), try_forward(model)
    found = find_blocks(model, linears, trial, blocks)
    layers, left_out = find_layers(model, linears, found, sources, trial, asked)
    return Skeleton(sources=sources, model=model, blocks=found, layers=layers, left_out=left_out)


def find_only_blocks(checkpoint: Checkpoint, dtype: torch.dtype) -> Skeleton:
    """The skeleton of a checkpoint as transformers runs it, fused experts and all, without layers.

    For what runs block by block and collects nothing. Raises InputError as `take_apart`.
    """
    model, sources = build_skeleton(checkpoint, dtype)
    blocks = find_blocks(model, linear_maps(model), try_forward(model))
    return Skeleton(sources=sources, model=model, blocks=blocks, layers=(), left_out=())
