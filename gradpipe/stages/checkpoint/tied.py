"""Matrices of a checkpoint that the model takes for one, though the files hold both.

An embedding and a head that are equal are one matrix to transformers, if `config.json` ties them.
"""

import re
from collections.abc import Iterator
from itertools import combinations

from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.checkpoint.layer_names import list_of
from gradpipe.store.objects import digest

_HEADS = ("lm_head.weight", "embed_out.weight")  # as transformers names them


def tied_to(checkpoint: Checkpoint, dense: Checkpoint | None) -> Iterator[tuple[str, str]]:
    """Pairs that should be equal and are not.

    Of a model with the `dense` one at hand, those that are equal there; else a head that is tied
    by its config.
    """
    tie = checkpoint.config.get("tie_word_embeddings")
    matrices = [info for info in checkpoint.tensors.values() if info.is_matrix]
    outside = [info for info in matrices if list_of(info.key) is None]
    own = {x.key: digest(checkpoint.read_bytes(x.key)) for x in outside if tie is not False}
    if dense is None:
        expected = [(head, table) for table, head in _heads(own)] if tie else []
    else:
        theirs = {key: digest(dense.read_bytes(key)) for key in own}
        expected = [(a, b) for a, b in combinations(own, 2) if theirs[a] == theirs[b]]
    for one, other in expected:
        same = checkpoint.tensors[one].shape == checkpoint.tensors[other].shape
        if same and own[one] != own[other]:
            yield one, other


def _heads(names: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Each embedding with each head."""
    heads = [name for name in names if name.endswith(_HEADS)]
    tables = [name for name in names if re.search(r"\b(wte|embed_\w+)\.weight$", name)]
    return ((table, head) for table in tables for head in heads)
