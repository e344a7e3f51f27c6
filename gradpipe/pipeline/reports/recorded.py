"""`pruning.json` read back: what a pruned checkpoint says of itself."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from gradpipe.errors import ODD_DOCUMENT, InputError
from gradpipe.pipeline.places import REPORT
from gradpipe.pipeline.reports.results import LayerResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What is needed of a `pruning.json`, its types checked."""

    document: Mapping[str, Any]  # all of it
    layers: Mapping[str, LayerResult]  # by name
    unseen: frozenset[str]  # names of layers that no calibration token reached
    method: str
    score: str | None  # the formula; None for a solver, and for masks that were put on
    update: str
    requested: float  # sparsity, over all pruned layers
    file_sparsity: float
    dense: Mapping[str, int]  # matrices of the blocks -> weights of theirs that no layer covers

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The report in a checkpoint's folder; InputError if there is none, or it is damaged."""
        path = folder / REPORT
        if not path.is_file():
            raise InputError(
                f"{folder} has no {REPORT}, expected what pipe prune or pipe mask apply wrote: "
                "give such a folder"
            )
        try:
            return cls.of(json.loads(path.read_bytes()))
        except (OSError, *ODD_DOCUMENT) as error:
            raise InputError(
                f"{path} is not what pipe prune wrote ({type(error).__name__}: "
                f"{str(error)[:80]}): restore it"
            ) from error

    @classmethod
    def of(cls, document: Any) -> Self:
        """The report that a document holds; one of `ODD_DOCUMENT` if it is none."""
        layers = {name: _layer(name, x) for name, x in document["layers"].items()}
        if not layers:
            raise ValueError("it names no layers")
        return cls(
            document=document,
            layers=layers,
            unseen=frozenset(map(str, document["unseen_layers"])),
            method=str(document["method"]),
            score=None if document.get("score") is None else str(document["score"]),
            update=str(document["update"]),
            requested=float(document["requested_sparsity"]),
            file_sparsity=float(document["file_sparsity"]),
            dense={str(key): int(x) for key, x in document["dense_weights"].items()},
        )


def _layer(name: str, entry: dict[str, Any]) -> LayerResult:
    pattern = entry["pattern"]
    layer = LayerResult(
        name=name,
        requested=float(entry["requested"]),
        zeros=int(entry["zeros"]),
        size=int(entry["size"]),
        pattern=None if pattern is None else str(pattern),
    )
    if not 0 <= layer.zeros <= layer.size or layer.size < 1:
        raise ValueError(f"{name}: {layer.zeros} zeros of {layer.size}")
    return layer
