"""Zarr groups and arrays as objects: where `store.arrays` (bytes) meets `store.objects` (files)."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from gradpipe.errors import StoreError
from gradpipe.store import arrays
from gradpipe.store.objects import ObjectReader, ObjectWriter

ATTRIBUTE = "gradpipe"  # everything that a node says of itself stands under this key

_ROOT_BYTES, _NODE_BYTES = 1 << 26, 1 << 20  # metadata's limits: the root consolidates all others


def write_group(objects: ObjectWriter, key: str, attributes: dict[str, Any] | None) -> None:
    """Write the metadata of a group."""
    document = {} if attributes is None else {ATTRIBUTE: attributes}
    objects.write(f"{key}/zarr.json".lstrip("/"), arrays.group_metadata(document))


def write_array(objects: ObjectWriter, key: str, array: npt.NDArray[Any]) -> None:
    """Write the metadata and the data of an array."""
    for name, data in arrays.encode_array(array).items():
        objects.write(f"{key}/{name}", data)


def read_attributes(objects: ObjectReader, key: str) -> object:
    """What the group under `key` says of itself; StoreError if it says nothing."""
    name = f"{key}/zarr.json".lstrip("/")
    try:
        limit = _NODE_BYTES if key else _ROOT_BYTES
        return arrays.parse_group(objects.read(name, limit))["attributes"][ATTRIBUTE]
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"store {objects.url}: {name} has no gradpipe attributes: it is damaged"
        ) from error


def read_array(
    objects: ObjectReader, key: str, shape: tuple[int, ...], dtype: str
) -> npt.NDArray[Any]:
    """The array under `key`, which must have this shape and dtype, else StoreError."""
    name = "/".join([key, "c", *("0" for _ in shape)])
    data = objects.read(name, arrays.most_bytes(shape, dtype))
    metadata = objects.read(f"{key}/zarr.json", _NODE_BYTES)
    try:
        return arrays.decode_array(metadata, data, shape, dtype)
    except StoreError as error:
        raise StoreError(f"store {objects.url}: {key}: {error}") from error
