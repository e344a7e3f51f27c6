"""Arrays as objects: Zarr v3 is the format, one object of data per array.

Zarr encodes and decodes in memory; `store.objects` moves the bytes. Only the one layout that
the format allows is ever decoded (`docs/store-format.md`): a regular grid of one shard, inner
chunks of whole rows, zstd with a checksum. What a store's metadata asks for beyond that is refused.
"""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from gradpipe.errors import StoreError

Array = npt.NDArray[Any]
DTYPES = ("uint8", "int32", "int64", "float16", "float32")
_CHUNK_BYTES = 4 << 20  # 1-6 MB decode fastest and still allow partial reads


def encode_array(array: Array, attributes: dict[str, Any] | None = None) -> dict[str, bytes]:
    """The two objects of one array, keyed `zarr.json` and `c/0/0` (`c/0` in one dimension)."""
    rows = _chunk_rows(array.shape, array.itemsize)
    shard_rows = math.ceil(array.shape[0] / rows) * rows
    store = MemoryStore()
    zarr_array = zarr.create_array(
        store,
        shape=array.shape,
        dtype=array.dtype,
        chunks=(rows, *array.shape[1:]),
        shards=(shard_rows, *array.shape[1:]),
        compressors=[ZstdCodec(level=1, checksum=True)],
        fill_value=0,
        config={"write_empty_chunks": True},
        attributes=attributes,
    )
    zarr_array[...] = array
    return contents(store)


def decode_array(metadata: bytes, data: bytes, shape: tuple[int, ...], dtype: str) -> Array:
    """The array behind two objects, which must have this shape and dtype, else StoreError."""
    document = _parse_json(metadata)
    _check_metadata(document, shape, dtype)
    prototype = default_buffer_prototype()
    key = "c/" + "/".join("0" for _ in shape)
    objects = {"zarr.json": metadata, key: data}
    store = MemoryStore({k: prototype.buffer.from_bytes(v) for k, v in objects.items()})
    try:
        array = zarr.open_array(store, mode="r", zarr_format=3)[...]
    except Exception as error:  # whatever a decoder raises on hostile bytes is damage
        raise StoreError(
            f"cannot decode an array of shape {shape} and type {dtype}: {error}"
        ) from error
    return np.asarray(array)


def group_metadata(attributes: dict[str, Any]) -> bytes:
    """The `zarr.json` of a group with these attributes."""
    store = MemoryStore()
    zarr.create_group(store, attributes=attributes, zarr_format=3)
    return contents(store)["zarr.json"]


def consolidate(metadata: dict[str, bytes]) -> bytes:
    """The root `zarr.json` that holds a copy of all others (`key -> bytes`, root included)."""
    prototype = default_buffer_prototype()
    store = MemoryStore({k: prototype.buffer.from_bytes(v) for k, v in metadata.items()})
    with warnings.catch_warnings():  # consolidated metadata is a convention, not in the v3 spec
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(store, zarr_format=3)
    return contents(store)["zarr.json"]


def contents(store: MemoryStore) -> dict[str, bytes]:
    """The objects of a store in memory."""
    return {key: buffer.to_bytes() for key, buffer in store._store_dict.items()}  # noqa: SLF001


def parse_group(metadata: bytes) -> dict[str, Any]:
    """A group's document, checked to be a Zarr v3 group, else StoreError."""
    document = _parse_json(metadata)
    if document.get("zarr_format") != 3 or document.get("node_type") != "group":
        raise StoreError("expected a Zarr v3 group")
    return document


def _chunk_rows(shape: tuple[int, ...], itemsize: int) -> int:
    """Rows of an inner chunk: about `_CHUNK_BYTES`, at least one row, at most all."""
    row_bytes = math.prod(shape[1:]) * itemsize
    return max(1, min(shape[0], _CHUNK_BYTES // row_bytes))


def _parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object, or StoreError."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"metadata is not JSON ({type(error).__name__})") from error
    if not isinstance(document, dict):
        raise StoreError(f"metadata is {type(document).__name__}, expected a JSON object")
    return document


def _check_metadata(document: dict[str, Any], shape: tuple[int, ...], dtype: str) -> None:
    """Refuse any array but the one that this format writes for `shape` and `dtype`."""
    rows = _chunk_rows(shape, np.dtype(dtype).itemsize)
    shard = [math.ceil(shape[0] / rows) * rows, *shape[1:]]
    got = {
        "zarr_format": document.get("zarr_format"),
        "node_type": document.get("node_type"),
        "data_type": document.get("data_type"),
        "shape": document.get("shape"),
        "chunk_grid": document.get("chunk_grid"),
        "codecs": document.get("codecs"),
        "fill_value": document.get("fill_value"),
        "storage_transformers": document.get("storage_transformers") or [],
    }
    expected = {
        "zarr_format": 3,
        "node_type": "array",
        "data_type": dtype,
        "shape": list(shape),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "codecs": [_sharding([rows, *shape[1:]], np.dtype(dtype).itemsize)],
        "fill_value": 0,
        "storage_transformers": [],
    }
    for name, value in expected.items():
        if got[name] != value:
            raise StoreError(f"array metadata: {name} is {str(got[name])[:200]}, expected {value}")


def _sharding(chunk_shape: list[int], itemsize: int) -> dict[str, Any]:
    """The one codec chain of the format, as it stands in `zarr.json`."""
    endian: dict[str, Any] = {"name": "bytes"}
    if itemsize > 1:
        endian["configuration"] = {"endian": "little"}
    zstd = {"name": "zstd", "configuration": {"level": 1, "checksum": True}}
    index = {"name": "bytes", "configuration": {"endian": "little"}}
    return {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": chunk_shape,
            "codecs": [endian, zstd],
            "index_codecs": [index, {"name": "crc32c"}],
            "index_location": "end",
        },
    }
