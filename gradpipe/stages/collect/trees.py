"""Nested tuples, lists and mappings, which blocks are called with and answer; their leaves."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

Place = tuple[Any, ...]  # the steps from the root: indices and keys


def leaves(tree: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Everything that is no container, and containers that are empty, with their places."""
    items = _items(tree)
    if not items:
        yield place, tree
    for step, item in items:
        yield from leaves(item, (*place, step))


def mappings(tree: Any, place: Place = ()) -> Iterator[tuple[Place, Mapping[Any, Any]]]:
    """Every mapping in a tree, with its place."""
    if isinstance(tree, Mapping):
        yield place, tree
    for step, item in _items(tree):
        yield from mappings(item, (*place, step))


def replaced(tree: Any, new: Mapping[Place, Any], place: Place = ()) -> Any:
    """The same tree with other leaves at some places, in containers of its own."""
    items = [(step, replaced(item, new, (*place, step))) for step, item in _items(tree)]
    if isinstance(tree, Mapping):
        copied: Any = copy.copy(tree)
        for key, item in items:
            copied[key] = item
        return copied
    if isinstance(tree, tuple | list) and place not in new:
        values = [item for _, item in items]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return new.get(place, tree)


def equal(a: Any, b: Any) -> bool:
    """Whether two leaves are the same, tensors by value; unknown things are if they are one."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all()))
    if isinstance(a, nn.Module | Tensor) or callable(a):
        return a is b
    return type(a) is type(b) and (a is b or bool(a == b))


def _items(tree: Any) -> list[tuple[Any, Any]]:
    if isinstance(tree, Mapping):
        return list(tree.items())
    return list(enumerate(tree)) if isinstance(tree, tuple | list) else []
