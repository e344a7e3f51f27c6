"""Which block a layer is in and what kind it is, by its name: what `pruning.json` has of it."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from gradpipe.pipeline.reports.results import LayerResult, Zeros

_IN_BLOCK = re.compile(r"(?P<block>.+?\.\d+)\.(?P<kind>.+)")


def block_of(name: str) -> str:
    """`model.layers.0` of `model.layers.0.mlp.up_proj`; a layer outside the blocks is its own."""
    found = _IN_BLOCK.fullmatch(name)
    return found["block"] if found else name


def kind_of(name: str) -> str:
    """`mlp.up_proj` of `model.layers.0.mlp.up_proj`; experts differ by a number: `experts.*.w1`."""
    found = _IN_BLOCK.fullmatch(name)
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", found["kind"]) if found else name


@dataclass(frozen=True, slots=True)
class Line:
    """Layers that are shown as one."""

    name: str
    num_layers: int
    found: Zeros

    @classmethod
    def of(cls, name: str, layers: Sequence[LayerResult]) -> Self:
        """All weights of these layers together."""
        return cls(name, len(layers), Zeros.sum(layers))


def summary(layers: Sequence[LayerResult], *, by_kind: bool) -> list[Line]:
    """A line for each kind of layer, or for each block, in the checkpoint's order."""
    group_of: Callable[[str], str] = kind_of if by_kind else block_of
    groups: dict[str, list[LayerResult]] = {}
    for layer in layers:
        groups.setdefault(group_of(layer.name), []).append(layer)
    names = groups if by_kind else sorted(groups, key=by_number)
    return [Line.of(name, groups[name]) for name in names]


def is_alike(layers: Iterable[LayerResult]) -> bool:
    """True if the same was asked of all layers of a kind, whichever block they are in."""
    asked: dict[str, tuple[float, str | None]] = {}
    return all(
        asked.setdefault(kind_of(x.name), (x.requested, x.pattern)) == (x.requested, x.pattern)
        for x in layers
    )


def by_number(name: str) -> list[tuple[int, str]]:
    """Block 2 before block 10."""
    return [(int(x) if x.isdecimal() else -1, x) for x in name.split(".")]
