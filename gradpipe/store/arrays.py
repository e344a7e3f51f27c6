"""Arrays and groups as objects: Zarr v3 is the format, one object of data per array.

Zarr encodes in memory; `store.objects` moves the bytes. Only the one layout that the format allows
is ever decoded (`docs/store-format.md`): one chunk, or one shard of inner chunks of whole rows,
zstd with a checksum. What a store's metadata asks for beyond that is refused, and so is a chunk
that would decode to more or less than its place in the array, before memory is taken for it.

A complete store's root holds a copy of all metadata: a reader takes it from there, in one request,
and reads no other `zarr.json`.
"""

import json
import math
import struct
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import zarr
from numcodecs import zstd
from zarr.codecs import ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from gradpipe.errors import StoreError
from gradpipe.store.objects import ObjectReader, ObjectWriter

Array = npt.NDArray[Any]
ATTRIBUTE = "gradpipe"  # everything that a group says of itself stands under this key
DTYPES = ("uint8", "int16", "int32", "int64", "float16", "float32")
_CHUNK_BYTES = 4 << 20  # 1-6 MB decode fastest and still allow partial reads
_UNPROVEN_BYTES = 1 << 30  # what an array may decode to, however few bytes it is stored in;
_MOST_COMPRESSED = 1000  # beyond that, at most so many times as many: statistics are noise
_BYTES_A_CODE = 8  # a byte of codes becomes two float32 norms
_ZSTD_MAGIC = 0xFD2FB528
_NO_CHUNK = (1 << 64) - 1  # in a shard's index: never written
_NODE_BYTES = 1 << 20  # of a group's or an array's metadata
_ROOT_BYTES, _BYTES_AN_OBJECT = 1 << 28, 1 << 11  # of the root's: it has those of all others


def write_group(objects: ObjectWriter, key: str, attributes: dict[str, Any] | None) -> None:
    """Write the metadata of a group."""
    document = {} if attributes is None else {ATTRIBUTE: attributes}
    objects.write(_metadata_key(key), group_metadata(document))


def write_array(objects: ObjectWriter, key: str, array: Array) -> None:
    """Write the metadata and the data of an array."""
    for name, data in encode_array(array).items():
        objects.write(f"{key}/{name}", data)


@dataclass(frozen=True, slots=True)
class Nodes:
    """Groups and arrays among a reader's objects; StoreError wherever one is not as it must be."""

    objects: ObjectReader
    copies: Mapping[str, str] = field(default_factory=dict)  # of metadata, by key, in one line each

    @classmethod
    def of_root(cls, objects: ObjectReader) -> tuple[object, Self]:
        """What the root of a complete store says of the store, and all below, by its copies."""
        known = objects.record.objects
        limit = min(_ROOT_BYTES, _NODE_BYTES + _BYTES_AN_OBJECT * len(known))
        metadata = objects.read(_metadata_key(""), limit)
        try:
            attributes, copies = parse_root(metadata)
        except StoreError as error:
            raise StoreError(f"store {objects.url}: zarr.json: {error}") from error
        listed = {_metadata_key(key) for key in copies}
        if odd := sorted(listed ^ {key for key in known if key.endswith("/zarr.json")}):
            raise StoreError(
                f"store {objects.url}: zarr.json and the commit record differ over {odd[0][:200]}: "
                "the store is damaged"
            )
        return attributes, cls(objects, copies)

    def attributes(self, key: str) -> object:
        """What a group says of itself."""
        try:
            return parse_group(self._metadata(key))["attributes"][ATTRIBUTE]
        except (KeyError, TypeError) as error:
            name = _metadata_key(key)
            raise StoreError(
                f"store {self.objects.url}: {name} has no gradpipe attributes: it is damaged"
            ) from error

    def array(self, key: str, shape: tuple[int, ...], dtype: str) -> Array:
        """An array, which must have this shape and dtype."""
        data = self.objects.read(array_key(key, shape), most_bytes(shape, dtype))
        metadata = self._metadata(key)
        try:
            return decode_array(metadata, data, shape, dtype)
        except StoreError as error:
            raise StoreError(f"store {self.objects.url}: {key}: {error}") from error

    def check_copies(self) -> None:
        """Refuse copies of metadata that are not what the group or the array itself says."""
        for key, copy in self.copies.items():
            name = _metadata_key(key)
            if _loads(self.objects.read(name, _NODE_BYTES), _folded) != copy:
                raise StoreError(
                    f"store {self.objects.url}: {name} is not what the root's zarr.json says of "
                    "it: the store is damaged"
                )

    def _metadata(self, key: str) -> bytes | str:
        copy = self.copies.get(key)
        return self.objects.read(_metadata_key(key), _NODE_BYTES) if copy is None else copy


def array_key(key: str, shape: tuple[int, ...]) -> str:
    """The object that holds all of an array's data."""
    return "/".join([key, "c", *("0" for _ in shape)])


def _metadata_key(key: str) -> str:
    return f"{key}/zarr.json".lstrip("/")


def parse_root(metadata: bytes) -> tuple[object, dict[str, str]]:
    """What a root says of its store, and its copies of all other metadata, by key.

    Each copy becomes a line of JSON as soon as it is read: as dictionaries they would take ten
    times the room, and most lines are equal.
    """
    document = _checked_group(_parse_json(metadata, object_hook=_folded))
    try:
        attributes = document["attributes"][ATTRIBUTE]
        copies = document["consolidated_metadata"]["metadata"]
        is_whole = all(isinstance(copy, str) for copy in copies.values())
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError("no gradpipe attributes, or no consolidated metadata") from error
    if not is_whole:
        raise StoreError("consolidated metadata of what is no group and no array")
    return attributes, copies


def _folded(document: dict[str, Any]) -> Any:
    """A group or an array as a line, anything else, the root too, as it is."""
    copies = document.get("consolidated_metadata")
    is_root = isinstance(copies, dict) and bool(copies.get("metadata"))
    is_node = document.get("node_type") in ("array", "group")
    return _one_line(document) if is_node and not is_root else document


def _one_line(node: dict[str, Any]) -> str:
    """A group's or an array's metadata, less what the root's copy alone has, in canonical form."""
    own = {name: value for name, value in node.items() if name != "consolidated_metadata"}
    return sys.intern(json.dumps(own, sort_keys=True, separators=(",", ":")))


def encode_array(array: Array) -> dict[str, bytes]:
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
    )
    zarr_array[...] = array
    return _contents(store)


def decode_array(metadata: bytes | str, data: bytes, shape: tuple[int, ...], dtype: str) -> Array:
    """The array behind two objects, which must have this shape and dtype, else StoreError."""
    _check_metadata(metadata, shape, dtype)
    itemsize = np.dtype(dtype).itemsize
    chunk, shard = _layout(shape, itemsize)
    chunk_bytes, num_chunks = math.prod(chunk) * itemsize, shard[0] // chunk[0]
    view = memoryview(data)
    frames = [view] if num_chunks == 1 else _inner_chunks(view, num_chunks)
    if odd := [frame for frame in frames if _content_size(frame) != chunk_bytes]:
        raise StoreError(f"a chunk decodes to {_content_size(odd[0])} bytes, not {chunk_bytes}")
    decoded = num_chunks * chunk_bytes * (_BYTES_A_CODE if dtype == "uint8" else 1)
    if decoded > max(_UNPROVEN_BYTES, _MOST_COMPRESSED * len(data)):
        raise StoreError(f"{len(data)} bytes would decode to {decoded}: refused")
    raw = np.empty((num_chunks, chunk_bytes), dtype=np.uint8)
    try:
        for frame, place in zip(frames, raw, strict=True):
            zstd.decompress(frame, place)
    except (ValueError, RuntimeError) as error:
        raise StoreError(f"a chunk of {dtype} {chunk} does not decode: {error}") from error
    return raw.reshape(-1).view(np.dtype(dtype).newbyteorder("<")).reshape(shard)[: shape[0]]


def most_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """More than an array of this shape and dtype can take up as an object."""
    _, shard = _layout(shape, np.dtype(dtype).itemsize)
    return 2 * math.prod(shard) * np.dtype(dtype).itemsize + 4096


def group_metadata(attributes: dict[str, Any]) -> bytes:
    """The `zarr.json` of a group with these attributes."""
    store = MemoryStore()
    zarr.create_group(store, attributes=attributes, zarr_format=3)
    return _contents(store)["zarr.json"]


def consolidate(metadata: dict[str, bytes]) -> bytes:
    """The root `zarr.json` that holds a copy of all others (`key -> bytes`, root included)."""
    prototype = default_buffer_prototype()
    store = MemoryStore({k: prototype.buffer.from_bytes(v) for k, v in metadata.items()})
    with warnings.catch_warnings():  # consolidated metadata is a convention, not in the v3 spec
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(store, zarr_format=3)
    return _contents(store)["zarr.json"]


def _contents(store: MemoryStore) -> dict[str, bytes]:
    """The objects of a store in memory, metadata as compact JSON: small layers have little else."""
    objects = {key: buffer.to_bytes() for key, buffer in store._store_dict.items()}  # noqa: SLF001
    for key in (key for key in objects if key.endswith("zarr.json")):
        objects[key] = json.dumps(json.loads(objects[key]), separators=(",", ":")).encode()
    return objects


def parse_group(metadata: bytes | str) -> dict[str, Any]:
    """A group's document, checked to be a Zarr v3 group, else StoreError."""
    return _checked_group(_parse_json(metadata))


def _checked_group(document: dict[str, Any]) -> dict[str, Any]:
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


def _parse_json(
    data: bytes | str, object_hook: Callable[[dict[str, Any]], Any] | None = None
) -> dict[str, Any]:
    """A JSON object, or StoreError."""
    document = _loads(data, object_hook)
    if not isinstance(document, dict):
        raise StoreError(f"metadata is {type(document).__name__}, expected a JSON object")
    return document


def _loads(data: bytes | str, object_hook: Callable[[dict[str, Any]], Any] | None) -> Any:
    """What is in a JSON document, or StoreError."""
    try:
        return json.loads(data, object_hook=object_hook)
    except (ValueError, RecursionError, TypeError) as error:
        raise StoreError(f"metadata is not JSON ({type(error).__name__})") from error


@lru_cache  # blocks are alike, and the reader keeps equal metadata once
def _check_metadata(metadata: bytes | str, shape: tuple[int, ...], dtype: str) -> None:
    """Refuse any array but the one that this format writes for `shape` and `dtype`."""
    document = _parse_json(metadata)
    itemsize = np.dtype(dtype).itemsize
    chunk, shard = _layout(shape, itemsize)
    codecs = _chunk_codecs(itemsize) if chunk == shard else [_sharding(chunk, itemsize)]
    document["storage_transformers"] = document.get("storage_transformers") or []
    expected = {
        "zarr_format": 3,
        "node_type": "array",
        "data_type": dtype,
        "shape": list(shape),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": codecs,
        "fill_value": 0.0 if dtype.startswith("float") else 0,
        "storage_transformers": [],
    }
    for name, value in expected.items():
        got = document.get(name)
        if json.dumps(got, sort_keys=True) != json.dumps(value, sort_keys=True):  # 3 ≠ 3.0
            raise StoreError(f"array metadata: {name} is {str(got)[:200]}, expected {value}")


def _chunk_codecs(itemsize: int) -> list[dict[str, Any]]:
    """How a chunk's numbers become bytes, as it stands in `zarr.json`."""
    numbers: dict[str, Any] = {"name": "bytes"}
    if itemsize > 1:
        numbers["configuration"] = {"endian": "little"}
    return [numbers, {"name": "zstd", "configuration": {"level": 1, "checksum": True}}]


def _inner_chunks(data: memoryview, count: int) -> list[memoryview]:
    """The encoded inner chunks of a shard, by its index: (offset, length) of each, and a crc32c."""
    index_bytes = 16 * count + 4
    if len(data) < index_bytes:
        raise StoreError(f"a shard of {count} chunks is only {len(data)} bytes")
    end = len(data) - index_bytes
    chunks = []
    for offset, length in struct.iter_unpack("<QQ", data[end:-4]):
        if offset == _NO_CHUNK or offset + length > end:
            raise StoreError("a shard lacks one of its chunks")
        chunks.append(data[offset : offset + length])
    return chunks


def _content_size(frame: memoryview) -> int | None:
    """How many bytes a zstd frame (RFC 8878) says that it decodes to; None if it does not."""
    if len(frame) < 14 or struct.unpack_from("<I", frame)[0] != _ZSTD_MAGIC:
        return None
    descriptor = frame[4]
    single_segment, size_flag, has_dictionary = descriptor & 32, descriptor >> 6, descriptor & 3
    if has_dictionary or not (size_flag or single_segment):
        return None
    start, size = (5 if single_segment else 6), 1 << size_flag
    stated = int.from_bytes(frame[start : start + size], "little")
    return stated + 256 if size == 2 else stated


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
