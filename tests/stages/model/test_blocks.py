"""Blocks where a pass without values tells nothing: those beside the tokens' embedding."""

from __future__ import annotations

import pytest
from torch import nn

from gradpipe.stages.model.blocks import find_blocks
from gradpipe.stages.model.linear import linear_maps
from gradpipe.stages.model.trial import Trial


class Toy(nn.Module):
    """A small language model beside a larger tower, as text and images in one checkpoint."""

    def __init__(self, *, reads_tokens: bool) -> None:
        """Without tokens it has no input embedding, as an image classifier."""
        super().__init__()
        self.visual = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(8, 8) for _ in range(3))})
        self.text = nn.ModuleDict(
            {"embed": nn.Embedding(5, 4), "layers": nn.ModuleList([nn.Linear(4, 4)])}
        )
        self._reads_tokens = reads_tokens

    def get_input_embeddings(self) -> nn.Module:
        """As transformers' models."""
        if not self._reads_tokens:
            raise NotImplementedError
        return self.text["embed"]


@pytest.mark.parametrize(
    ("reads_tokens", "ran", "expected"),
    [
        (True, (), "text.layers"),
        (False, (), "visual.blocks"),
        (True, ("visual.blocks.0",), "visual.blocks"),
    ],
)
def test_what_runs_comes_first_then_what_is_near_the_embedding_then_what_is_large(
    *, reads_tokens: bool, ran: tuple[str, ...], expected: str
) -> None:
    """So a tower is not taken for the blocks where its code stops a pass that has no values."""
    model = Toy(reads_tokens=reads_tokens)
    trial = Trial(
        times=dict.fromkeys(ran, 1),
        shapes={},
        reads={},
        reached=frozenset(),
        mixed=frozenset(),
        error="stopped",
    )
    assert find_blocks(model, linear_maps(model), trial).path == expected
