"""A corpus of hostile stores: what an attacker may do to one, each with a name.

`KINDS` are mutations of a finished store's objects: another value at one place of its metadata,
documents that are no metadata, chunks that lie about their size. `put` writes a commit record that
fits what was changed, so that digests alone do not find it.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import zstd

from gradpipe.store.objects import CommitRecord, digest

Objects = dict[str, bytes]
Mutation = Callable[[Objects], None]

NAME = "model.layers.0.up"
SHAPE = (24, 16)
BOMB_BYTES = 1 << 30

ROOT = "zarr.json"
L1, L2, ACT = (f"layers/{NAME}/{name}" for name in ("grad_l1", "grad_l2", "act_l2"))
VALUES, CODES = f"{ACT}/values", f"{L2}/codes"


def put(store: Path, objects: Objects, record: bytes | None = None) -> Path:
    """Write objects, and a commit record that fits them."""
    fitting = CommitRecord({key: (len(data), digest(data)) for key, data in objects.items()})
    for key, data in {**objects, "commit.json": record or fitting.to_bytes()}.items():
        path = store / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return store


# What an attacker may do. Edits of metadata: (object, path in it, new value).

GONE = object()
DEEP = "[" * 200_000 + "]" * 200_000
ATTRIBUTES = ("attributes", "gradpipe")


def edit(key: str, path: tuple[str | int, ...], value: object) -> Mutation:
    """Set, or remove, one place in an object of JSON."""

    def mutation(objects: Objects) -> None:
        document = json.loads(objects[key])
        node = document
        for step in path[:-1]:
            node = node[step]
        if value is GONE:
            del node[path[-1]]
        else:
            node[path[-1]] = value
        objects[key] = json.dumps(document).encode()

    return mutation


def replace(key: str, data: bytes) -> Mutation:
    """Other bytes for an object."""
    return lambda objects: objects.update({key: data})


def remove(key: str) -> Mutation:
    """One object less, in the record too."""

    def mutation(objects: Objects) -> None:
        del objects[key]

    return mutation


def frame(total: int, claims: int | None) -> bytes:
    """A zstd frame (RFC 8878) of so many zeros in runs of 128 KiB, which claims another size."""
    flags = b"\xc0\x38" + struct.pack("<Q", claims) if claims is not None else b"\x00\x38"
    body, left = b"", total
    while left or not body:
        size = min(left, 1 << 17)
        left -= size
        body += struct.pack("<I", (left == 0) | 2 | size << 3)[:3] + b"\0"
    return b"\x28\xb5\x2f\xfd" + flags + body


ROOT_EDITS: dict[str, list[object]] = {
    "version": [1, 3, 0, -1, True, "1", None, 10**400, GONE],
    "gradpipe": [1, GONE],
    "objective": [None, ["causal-lm"]],
    "model": [None, [], "toy", {}, GONE],
    "model.name": [1, GONE],
    "samples": [None, {}],
    "samples.num_samples": [0, -1, 3, 2**40, 10**30, 2.0, True],
    "samples.seq_len": [0, -3, 4, 2**40, "3"],
    "samples.digest": ["", "0" * 32, None],
    "statistics": [[], ["grad_l1", "grad_l1"], ["../../etc"], ["hessian"], "grad_l1", [["x"]]],
    "encoding": [1, None],
    "layers": [[], {}, None, [None], [[]], "x"],
    "layers.0.name": ["../../etc/passwd", "/etc/passwd", "a/b", "..", ".", "", "a..b", "x" * 300],
    "layers.0.weight_key": [1, None],
    "layers.0.shape": [
        *([], [24], [24, 16, 1], [0, 16], [-24, -16], [16, 24], [24.0, 16], [True, 16], "24"),
        *([2**40, 2**40], [10**30, 16], [2**31, 16], [24, 2**62], {"0": 24}),
    ],
    "layers.0.block": ["0", 0.0, False],
    "layers.0.transposed": [0, None],
    "layers.0.digest": [None, 0],
    "layers.0.input_of": [NAME, "nobody", 1, "../x"],
    "layers.0.part": [[0, 2], [], [0], [2, 2], [-1, 2], [0, 2, 3], [True, 2], [0, 2**40], "0/2"],
    "layers.0.hessian_of": [None],
    "couplings": [None, {}, [None], [{}], [{"source": NAME, "target": NAME, "outputs": []}]],
    "extra": [1],
}
STATISTIC_EDITS: dict[str, list[object]] = {
    "encoding": ["pickle", "float64", "", "../log", None, "x" * 10_000],
    "num_samples": [0, -1, 10**300, 1.0, "2", True],
    "num_tokens": [-1, 10**300, None],
    "scale": [float("nan"), float("inf"), 0.0, -1.0, 1e300, 1, "1.0", 2.0],
    "num_escapes": [-1, 10**9, 10**300, 10**4, 0.0],
    "base": ["act_l2", "grad_l1", "../x", "/etc", "", 1, ["grad_l2"]],
    "extra": [None],
}
ARRAY_EDITS: dict[str, list[object]] = {
    "zarr_format": [2, "3", None, GONE],
    "node_type": ["group", None],
    "shape": [[], [1], [2**62], [16, 1], [-1], None, "16"],
    "data_type": ["float64", "object", "|O", {"name": "numpy.pickle"}, "uint8", None],
    "chunk_grid": [None, {"name": "regular", "configuration": {"chunk_shape": [2**50]}}],
    "chunk_key_encoding": [{"name": "v2"}, {"name": "../x"}, None],
    "fill_value": [1.0, "NaN", None, "0x41414141"],
    "codecs": [
        *([], None, [{"name": "bytes"}], [{"name": "gzip", "configuration": {"level": 1}}]),
        [{"name": "numcodecs.pickle", "configuration": {}}],
        [{"name": "numcodecs.zlib", "configuration": {"id": "pickle"}}, {"name": "bytes"}],
        [{"name": "__import__('os').system", "configuration": {"cmd": "touch hacked"}}],
    ],
    "storage_transformers": [[{"name": "x"}]],
}


def steps(path: str) -> tuple[str | int, ...]:
    """`layers.0.name` as places in JSON."""
    return tuple(int(step) if step.isdecimal() else step for step in path.split("."))


def kinds() -> Iterator[tuple[str, Mutation]]:
    """Every mutation that `validate` must refuse, with a name."""
    places: tuple[tuple[str, str, tuple[str, ...], dict[str, list[object]]], ...] = (
        ("root", ROOT, ATTRIBUTES, ROOT_EDITS),
        ("statistic", f"{L1}/zarr.json", ATTRIBUTES, STATISTIC_EDITS),
        ("plain", f"{ACT}/zarr.json", ATTRIBUTES, {"scale": [2.0], "num_escapes": [3]}),
        ("array", f"{VALUES}/zarr.json", (), ARRAY_EDITS),
    )
    for name, key, prefix, edits in places:
        for path, values in edits.items():
            for number, value in enumerate(values):
                yield f"{name} {path} {number}", edit(key, (*prefix, *steps(path)), value)
    yield from documents()
    yield from chunks()
    yield "more escapes", replace(f"{CODES}/c/0/0", encoded(np.full((24, 8), 255, dtype=np.uint8)))
    yield "a missing part", remove(f"{CODES}/c/0/0")
    yield "an array in v2", v2_array
    yield "a base of another encoding", float32_base


def documents() -> Iterator[tuple[str, Mutation]]:
    """Metadata that is none."""
    for key in (ROOT, f"{L1}/zarr.json", f"{VALUES}/zarr.json"):
        odd = (b"", b"null", b"[]", b"{", b"\xff\xfe", DEEP.encode(), b'{"a":' * 9999, b"NaN")
        for number, data in enumerate(odd):
            yield f"not metadata {number} {key}", replace(key, data)
        yield f"missing {key}", remove(key)
    for key in (ROOT, f"{L1}/zarr.json"):
        yield f"no attributes {key}", edit(key, ("attributes",), GONE)
        yield f"no gradpipe {key}", edit(key, ATTRIBUTES, GONE)
        yield f"listed attributes {key}", edit(key, ("attributes",), ["gradpipe"])


def chunks() -> Iterator[tuple[str, Mutation]]:
    """Data that is not 16 squares: torn, of another length, or far more than it seems."""
    whole = frame(64, 64)
    damaged = (b"", b"\x28\xb5\x2f\xfd", random.Random(0).randbytes(40), whole[:-1], whole * 2)
    bombs = (
        *(frame(BOMB_BYTES, None), frame(BOMB_BYTES, BOMB_BYTES), frame(BOMB_BYTES, 64)),
        *(whole + frame(BOMB_BYTES, None), frame(64, 2**60), frame(32, 32), frame(32, 64)),
        *(frame(128, 64), b"\x50\x2a\x4d\x18" + struct.pack("<I", 9) + bytes(9) + whole),
    )
    for number, data in enumerate((*damaged, *bombs)):
        yield f"chunk {number}", replace(f"{VALUES}/c/0", data)
    yield "nan", replace(f"{VALUES}/c/0", encoded(np.full(16, np.nan, dtype=np.float32)))
    yield "a negative square", replace(f"{VALUES}/c/0", encoded(np.full(16, -1, dtype=np.float32)))


def encoded(array: np.ndarray[Any, Any]) -> bytes:
    """One chunk, as the format has it."""
    return bytes(zstd.compress(array.tobytes(), 1, True))  # noqa: FBT003 (its checksum)


def v2_array(objects: Objects) -> None:
    """Zarr 2 metadata, with a codec that unpickles, in place of version 3."""
    del objects[f"{VALUES}/zarr.json"]
    objects[f"{VALUES}/.zarray"] = json.dumps(
        {
            "zarr_format": 2,
            "shape": [16],
            "chunks": [16],
            "dtype": "|O",
            "compressor": None,
            "fill_value": None,
            "order": "C",
            "filters": [{"id": "pickle", "protocol": 5}],
        }
    ).encode()


def float32_base(objects: Objects) -> None:
    """`grad_l1` is coded against a `grad_l2` that has no levels."""
    key = f"{L2}/zarr.json"
    for field, value in {"encoding": "float32", "num_escapes": 0}.items():
        edit(key, (*ATTRIBUTES, field), value)(objects)
    source = f"{L2}/values"
    document = json.loads(objects[f"{CODES}/zarr.json"])
    document |= {"shape": list(SHAPE), "data_type": "float32", "fill_value": 0.0}
    document["chunk_grid"]["configuration"]["chunk_shape"] = list(SHAPE)
    document["codecs"][0] = {"name": "bytes", "configuration": {"endian": "little"}}
    objects[f"{source}/zarr.json"] = json.dumps(document).encode()
    objects[f"{source}/c/0/0"] = encoded(np.ones(SHAPE, dtype=np.float32))


KINDS = dict(kinds())
