"""Arrays as objects: Zarr v3 is the format, one object of data per array.

Zarr encodes and decodes in memory; `store.objects` moves the bytes. Only the one layout that
the format allows is ever decoded (`docs/store-format.md`): one chunk, or one shard of inner chunks
of whole rows, zstd with a checksum. What a store's metadata asks for beyond that is refused.
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
DTYPES = ("uint8", "int16", "int32", "int64", "float16", "float32")
_CHUNK_BYTES = 4 << 20  # 1-6 MB decode fastest and still allow partial reads


def encode_array(array: Array, attributes: dict[str, Any] | None = None) -> dict[str, bytes]:
    """The two objects of one array, keyed `zarr.json` and `c/0/0` (`c/0` in one dimension)."""
    chunk, shard = _layout(array.shape, array.itemsize)
    store = MemoryStore()
    zarr_array = zarr.create_array(
        store,
        shape=array.shape,
        dtype=array.dtype,
        chunks=chunk,
        shards=shard if shard != chunk else None,
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
    """The objects of a store in memory, metadata as compact JSON: small layers have little else."""
    objects = {key: buffer.to_bytes() for key, buffer in store._store_dict.items()}  # noqa: SLF001
    return {
        key: _compact(data) if key.endswith("zarr.json") else data for key, data in objects.items()
    }


def _compact(document: bytes) -> bytes:
    return json.dumps(json.loads(document), separators=(",", ":")).encode()


def parse_group(metadata: bytes) -> dict[str, Any]:
    """A group's document, checked to be a Zarr v3 group, else StoreError."""
    document = _parse_json(metadata)
    if document.get("zarr_format") != 3 or document.get("node_type") != "group":
        raise StoreError("expected a Zarr v3 group")
    return document


def _layout(shape: tuple[int, ...], itemsize: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the inner chunk, whole rows of about `_CHUNK_BYTES`, and of the one shard.

    Where they are equal the array is one plain chunk.
    """
    row_bytes = math.prod(shape[1:]) * itemsize
    rows = max(1, min(shape[0], _CHUNK_BYTES // row_bytes))
    shard_rows = math.ceil(shape[0] / rows) * rows
    return (rows, *shape[1:]), (shard_rows, *shape[1:])


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
    itemsize = np.dtype(dtype).itemsize
    chunk, shard = _layout(shape, itemsize)
    codecs = _chunk_codecs(itemsize) if chunk == shard else [_sharding(chunk, itemsize)]
    got = {
        "zarr_format": document.get("zarr_format"),
        "node_type": document.get("node_type"),
        "data_type": document.get("data_type"),
        "shape": document.get("shape"),
        "chunk_grid": document.get("chunk_grid"),
        "chunk_key_encoding": document.get("chunk_key_encoding"),
        "codecs": document.get("codecs"),
        "fill_value": document.get("fill_value"),
        "storage_transformers": document.get("storage_transformers") or [],
    }
    expected = {
        "zarr_format": 3,
        "node_type": "array",
        "data_type": dtype,
        "shape": list(shape),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": codecs,
        "fill_value": 0,
        "storage_transformers": [],
    }
    for name, value in expected.items():
        if got[name] != value:
            raise StoreError(f"array metadata: {name} is {str(got[name])[:200]}, expected {value}")


def _chunk_codecs(itemsize: int) -> list[dict[str, Any]]:
    """How a chunk's numbers become bytes, as it stands in `zarr.json`."""
    numbers: dict[str, Any] = {"name": "bytes"}
    if itemsize > 1:
        numbers["configuration"] = {"endian": "little"}
    return [numbers, {"name": "zstd", "configuration": {"level": 1, "checksum": True}}]


def _sharding(chunk: tuple[int, ...], itemsize: int) -> dict[str, Any]:
    """The codec of an array of several inner chunks."""
    index = {"name": "bytes", "configuration": {"endian": "little"}}
    return {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": list(chunk),
            "codecs": _chunk_codecs(itemsize),
            "index_codecs": [index, {"name": "crc32c"}],
            "index_location": "end",
        },
    }
