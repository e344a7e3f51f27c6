"""Which block a layer is in and what kind it is, by its name: what `pruning.json` has of it."""

import re
from collections.abc import Callable, Iterable, Sequence

from gradpipe.pipeline.reports.results import LayerResult

_IN_BLOCK = re.compile(r"(?P<block>.+?\.\d+)\.(?P<kind>.+)")


def block_of(name: str) -> str:
    """`model.layers.0` of `model.layers.0.mlp.up_proj`; a layer outside the blocks is its own."""
    found = _IN_BLOCK.fullmatch(name)
    return found["block"] if found else name


def kind_of(name: str) -> str:
    """`mlp.up_proj` of `model.layers.0.mlp.up_proj`; experts differ by a number: `experts.*.w1`."""
    found = _IN_BLOCK.fullmatch(name)
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", found["kind"]) if found else name


def summary(layers: Sequence[LayerResult], *, by_kind: bool) -> dict[str, list[LayerResult]]:
    """The layers of each kind, or of each block, in the checkpoint's order."""
    group_of: Callable[[str], str] = kind_of if by_kind else block_of
    groups: dict[str, list[LayerResult]] = {}
    for layer in layers:
        groups.setdefault(group_of(layer.name), []).append(layer)
    return groups if by_kind else {name: groups[name] for name in sorted(groups, key=by_number)}


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
