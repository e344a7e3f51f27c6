"""Commit records and shard indices that lie, and objects that are no files of the store."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradpipe import GradientStore, StoreError
from gradpipe.store.arrays import decode_array, encode_array
from gradpipe.store.objects import CommitRecord, digest
from tests.store.corpus import DEEP, VALUES, Objects, put
from tests.support.contained import contained


def read_activations(store: Path) -> None:
    """As pruning reads."""
    opened = GradientStore.open(store)
    opened.read(opened.spec.layers[0], ["act_l2"])


def record_of(objects: Objects, **changes: tuple[int, str]) -> bytes:
    """A commit record with entries of its own."""
    entries = {key: (len(data), digest(data)) for key, data in objects.items()}
    return CommitRecord({**entries, **changes}).to_bytes()


@pytest.mark.parametrize(
    "key", ["../x", "/etc/passwd", "a//b", "a/./b", "a/../../b", "", ".", "..", "a\\b", "a\0b", "ü"]
)
def test_a_record_cannot_name_what_is_not_in_the_store(
    tmp_path: Path, objects: Objects, key: str
) -> None:
    """A key that could lead elsewhere is refused before anything is looked for."""
    record = record_of(objects, **{key: (1, "0" * 32)})
    store = put(tmp_path / "store", objects, record)
    with contained(tmp_path), pytest.raises(StoreError, match="no object's key"):
        GradientStore.open(store)


@pytest.mark.parametrize(
    "size", [-1, -2, 10**12, 10**25, 10**4000], ids=["-1", "-2", "big", "bigger", "biggest"]
)
def test_a_record_cannot_ask_for_memory(tmp_path: Path, objects: Objects, size: int) -> None:
    """Sizes below zero would read on without end, huge ones would be allocated: neither happens."""
    record = record_of(objects, **{f"{VALUES}/c/0": (size, "0" * 32)})
    store = put(tmp_path / "store", objects, record)
    with contained(tmp_path), pytest.raises(StoreError):
        GradientStore.open(store).validate()
    with contained(tmp_path), pytest.raises(StoreError):
        read_activations(store)


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"[]", b"null", b"{}", b'{"objects": []}', b'{"objects": {"a": 1}}', b"\x80"),
        *(b'{"objects": {"a": [NaN, ""]}}', b'{"objects": {"a": [Infinity, ""]}}'),
        *(DEEP.encode(), b'{"objects": {"a": [1e999, ""]}}', b'{"objects": {"a": ["1", "0"]}}'),
    ],
)
def test_a_record_is_only_itself(tmp_path: Path, objects: Objects, data: bytes) -> None:
    """Anything but the canonical form is damage."""
    with contained(tmp_path), pytest.raises(StoreError, match=r"commit\.json is damaged"):
        GradientStore.open(put(tmp_path / "store", objects, data or b" "))


@pytest.mark.parametrize("key", ["commit.json", "zarr.json", f"{VALUES}/c/0"])
@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_only_files_inside_the_store_are_read(
    tmp_path: Path, objects: Objects, key: str, kind: str
) -> None:
    """A named pipe would be waited on for ever, and a link could lead anywhere."""
    store = put(tmp_path / "store", objects)
    data = (store / key).read_bytes()
    (store / key).unlink()
    if kind == "pipe":
        os.mkfifo(store / key)
    elif kind == "folder":
        (store / key).mkdir()
    else:
        (tmp_path / "elsewhere").write_bytes(data)
        (store / key).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="not a file inside the store"):
        GradientStore.open(store).validate()


SHARDED = (3, 1 << 20)  # float32, rows of 4 MiB: three chunks in one shard


def lacking(index: Any) -> None:
    """A chunk that was never written, which Zarr would read as zeros."""
    index[1] = (1 << 64) - 1


def outside(index: Any) -> None:
    """A chunk beyond the end of the shard."""
    index[1, 0] += 1 << 40


def longer(index: Any) -> None:
    """A chunk that reaches into the index."""
    index[2, 1] += 8


def torn(index: Any) -> None:
    """A chunk that starts in the middle of another."""
    index[2, 0] += 8


@pytest.mark.parametrize("change", [lacking, outside, longer, torn])
def test_the_index_of_a_shard_is_not_trusted(change: Callable[[Any], None]) -> None:
    """Every chunk must lie in the shard, and decode to its place in the array."""
    array = np.random.default_rng(0).normal(size=SHARDED).astype(np.float32)
    objects = encode_array(array)
    metadata, data = objects["zarr.json"], objects["c/0/0"]
    assert np.array_equal(decode_array(metadata, data, SHARDED, "float32"), array)
    index = np.frombuffer(data[-52:-4], dtype="<u8").reshape(3, 2).copy()
    change(index)
    with pytest.raises(StoreError):
        decode_array(metadata, data[:-52] + index.tobytes() + data[-4:], SHARDED, "float32")


def test_codes_count_for_what_they_become() -> None:
    """Half a byte becomes a float32: 512 MiB of zeros, stored in kilobytes, are refused."""
    shape = (16384, 32768)
    zeros = encode_array(np.zeros((128, 32768), dtype=np.uint8))
    document = json.loads(zeros["zarr.json"]) | {"shape": list(shape)}
    inner = {"name": "regular", "configuration": {"chunk_shape": list(shape)}}
    document["chunk_grid"] = inner
    many = encode_array(np.zeros((256, 32768), dtype=np.uint8))
    document["codecs"] = json.loads(many["zarr.json"])["codecs"]
    frame = zeros["c/0/0"]
    index = b"".join(struct.pack("<QQ", i * len(frame), len(frame)) for i in range(128))
    with pytest.raises(StoreError, match="refused"):
        decode_array(json.dumps(document).encode(), frame * 128 + index + bytes(4), shape, "uint8")


def test_a_shard_cannot_say_the_same_thing_a_thousand_times() -> None:
    """Chunks that share their bytes would be a bomb: what is stored bounds what it decodes to."""
    shape = (4096, 1 << 20)  # 16 GiB
    zeros = encode_array(np.zeros((2, 1 << 20), dtype=np.float32))
    document = json.loads(zeros["zarr.json"]) | {"shape": list(shape)}
    document["chunk_grid"]["configuration"]["chunk_shape"] = list(shape)
    offset, length = struct.unpack_from("<QQ", zeros["c/0/0"], len(zeros["c/0/0"]) - 36)
    index = struct.pack("<QQ", 0, length) * shape[0] + bytes(4)
    data = zeros["c/0/0"][offset : offset + length] + index
    with pytest.raises(StoreError, match="refused"):
        decode_array(json.dumps(document).encode(), data, shape, "float32")
