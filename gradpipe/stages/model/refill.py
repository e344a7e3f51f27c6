"""Other weights for a model that is loaded, as `from_pretrained` would have put them there.

A checkpoint's tensors become a model's by transformers' own rules (`stages/model/conversion.py`);
so do tensors of the same names that are in no file. Values are copied into the parameters that are
there: nothing is loaded again, and what one parameter ties stays tied.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.model.conversion import Source, find_sources


class Refill:
    """Writes tensors named as a checkpoint's into the model that was loaded from it."""

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        """InputError if the checkpoint's tensors are not the model's."""
        self._model = model
        self._stored: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        sources = find_sources(model, checkpoint).by_name.values()
        self._by_key = {key: source for source in sources for key in source.keys}

    def together(self, keys: Iterable[str]) -> list[tuple[str, ...]]:
        """The keys that must be written at once with each of these; one that fills nothing alone.

        Experts that the checkpoint keeps one by one are one parameter in the model.
        """
        groups = (self._by_key[key].keys if key in self._by_key else (key,) for key in keys)
        return list(dict.fromkeys(groups))

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write one group, by key, each in the checkpoint's own shape and dtype."""
        source: Source | None = self._by_key.get(next(iter(tensors)))
        if source is None:
            return  # transformers takes nothing from it
        for name, tensor in source.make(tensors.__getitem__, self._model).items():
            if name in self._stored:
                self._stored[name].copy_(tensor)
