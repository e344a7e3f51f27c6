"""Stores that were tampered with: always a GradpipeError, never code, memory or another file.

Two attackers. One changes bytes, and is found by the digests. The other writes a commit record that
fits what was changed, and is found by what the bytes say.
"""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import zstd
from safetensors.numpy import save_file

import gradpipe.cli
from gradpipe import GradientStore, GradpipeError, PruneConfig, StoreError, prune
from gradpipe.store.arrays import decode_array, encode_array
from gradpipe.store.folder import Calibration
from gradpipe.store.objects import CommitRecord, digest
from gradpipe.store.schema import FORMAT_VERSION, LayerSpec, ModelSpec, SampleSpec, StoreSpec
from gradpipe.store.statistics import LayerStats
from gradpipe.store.writer import StoreWriter

Objects = dict[str, bytes]
Mutation = Callable[[Objects], None]

NAME = "model.layers.0.up"
SHAPE = (24, 16)
INPUT_IDS = np.arange(6, dtype=np.int32).reshape(2, 3)
PEAK_BYTES = 16 << 20
BOMB_BYTES = 1 << 30

ROOT = "zarr.json"
L1, L2, ACT = (f"layers/{NAME}/{name}" for name in ("grad_l1", "grad_l2", "act_l2"))
VALUES, CODES = f"{ACT}/values", f"{L2}/codes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one weight, and a finished store of it."""
    folder = tmp_path_factory.mktemp("hostile")
    generator = np.random.default_rng(0)
    weight = generator.normal(size=SHAPE).astype(np.float32)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"architectures": ["Toy"]}')
    save_file({f"{NAME}.weight": weight}, folder / "model" / "model.safetensors")
    layer = LayerSpec(
        name=NAME,
        weight_key=f"{NAME}.weight",
        shape=SHAPE,
        block=0,
        transposed=False,
        digest=digest(weight.tobytes()),
    )
    spec = StoreSpec(
        version=FORMAT_VERSION,
        gradpipe="0.1.0",
        objective="causal-lm",
        model=ModelSpec(
            name="toy", revision=None, architecture="Toy", dtype="float32", config_digest="1" * 32
        ),
        samples=SampleSpec(
            dataset="text",
            revision=None,
            sampling="document",
            seed=0,
            num_samples=2,
            seq_len=3,
            digest=digest(INPUT_IDS.tobytes()),
        ),
        statistics=("grad_l1", "grad_l2", "act_l2"),
        encoding="compact",
        layers=(layer,),
        command="pipe collect-grads toy STORE",
    )
    sums = np.exp(generator.normal(-9, 2, SHAPE)).astype(np.float32)
    arrays = {"grad_l1": sums, "grad_l2": sums**2, "act_l2": np.ones(SHAPE[1], dtype=np.float32)}
    writer = StoreWriter(folder / "store", spec)
    writer.begin(
        Calibration(arrays={"input_ids": INPUT_IDS, "sources": np.zeros((2, 2), np.int64)})
    )
    writer.write_layer(layer, LayerStats(arrays=arrays, num_samples=2, num_tokens=6))
    writer.commit()
    return folder


@pytest.fixture(scope="module")
def objects(folder: Path) -> Objects:
    """Every object of the store but its commit record."""
    store = folder / "store"
    record = CommitRecord.from_bytes((store / "commit.json").read_bytes())
    return {key: (store / key).read_bytes() for key in record.objects}


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
    "scale": [float("nan"), float("inf"), 0.0, -1.0, 1e300, 1, "1.0"],
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


@dataclass(slots=True)
class Watch:
    """Files that were opened, while it is on."""

    paths: list[str] | None = None

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        """Hear of every file that Python opens."""
        if self.paths is not None and event == "open" and isinstance(arguments[0], str):
            self.paths.append(arguments[0])


WATCH = Watch()
sys.addaudithook(WATCH)  # a hook is for life: that is why it can be switched off


@contextmanager
def contained(folder: Path) -> Iterator[None]:
    """What runs in it opens no file but those below `folder`, and stays small in memory."""
    WATCH.paths = []
    tracemalloc.start()
    try:
        yield
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        paths, WATCH.paths = WATCH.paths, None
    code = (sys.prefix, sys.base_prefix, str(Path(gradpipe.cli.__file__).parent), "/proc", "/sys")
    odd = [path for path in paths if not path.startswith((str(folder), *code))]
    assert not odd
    assert peak < PEAK_BYTES


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_that_lies_is_refused(
    tmp_path: Path, folder: Path, objects: Objects, kind: str
) -> None:
    """Whatever was changed, with digests that fit: a StoreError, and no file or memory beyond.

    Metadata are changed in the root's copy too, which is the one that is read.
    """
    mutated = copy.copy(objects)
    KINDS[kind](mutated)
    copy_to_root(mutated, objects)
    store = put(tmp_path / "store", mutated)
    with contained(tmp_path), pytest.raises(StoreError):
        GradientStore.open(store).validate()
    config = PruneConfig(model=str(folder / "model"), store=str(store), out=tmp_path / "out")
    try:
        prune(config)  # what it does not read, it does not miss
    except GradpipeError:
        assert [path.name for path in tmp_path.iterdir()] == ["store"]


def copy_to_root(mutated: Objects, objects: Objects) -> None:
    """Bring what was changed in other metadata into the root's copy, where it is JSON."""
    keys = [key for key in {*mutated, *objects} - {ROOT} if key.endswith("zarr.json")]
    with suppress(ValueError, RecursionError, KeyError, TypeError):
        root = json.loads(mutated[ROOT])
        nodes = root["consolidated_metadata"]["metadata"]
        for key in keys:
            if key not in mutated:
                del nodes[key.removesuffix("/zarr.json")]
            elif mutated[key] != objects.get(key):
                nodes[key.removesuffix("/zarr.json")] = json.loads(mutated[key])
        mutated[ROOT] = json.dumps(root).encode()


@pytest.mark.parametrize("key", [f"{L1}/zarr.json", f"{VALUES}/zarr.json", "layers/zarr.json"])
def test_a_copy_that_is_not_the_original_is_damage(
    tmp_path: Path, objects: Objects, key: str
) -> None:
    """Other readers go by a group's own metadata: verification holds them against the root's."""
    mutated = copy.copy(objects)
    edit(key, ("attributes", "mine"), 1)(mutated)
    store = GradientStore.open(put(tmp_path / "store", mutated))
    with pytest.raises(StoreError, match=f"{key} is not what the root's zarr.json says of it"):
        store.verify()


def test_the_root_lists_what_the_record_names(tmp_path: Path, objects: Objects) -> None:
    """A group that one of the two lacks is noticed when the store is opened."""
    place = ("consolidated_metadata", "metadata", ACT)
    for number, mutation in enumerate(
        (edit(ROOT, place, GONE), remove(f"{ACT}/zarr.json"), replace("x/zarr.json", b"{}"))
    ):
        mutated = copy.copy(objects)
        mutation(mutated)
        with pytest.raises(StoreError, match="and the commit record differ over"):
            GradientStore.open(put(tmp_path / str(number), mutated))


@pytest.mark.parametrize("copies", [None, [], {}, {"x": 1}, {ACT: []}, {ACT: {"node_type": []}}])
def test_a_root_without_a_copy_of_all_metadata_is_damaged(
    tmp_path: Path, objects: Objects, copies: object
) -> None:
    """Only groups and arrays stand in it, and they must."""
    for number, path in enumerate(
        (("consolidated_metadata", "metadata"), ("consolidated_metadata",))
    ):
        mutated = copy.copy(objects)
        edit(ROOT, path, copies)(mutated)
        with pytest.raises(StoreError, match=r"zarr\.json: "):
            GradientStore.open(put(tmp_path / str(number), mutated))


def read_activations(store: Path) -> None:
    """As pruning reads."""
    opened = GradientStore.open(store)
    opened.read(opened.spec.layers[0], ["act_l2"])


def record_of(objects: Objects, **changes: tuple[int, str]) -> bytes:
    """A commit record with entries of its own."""
    entries = {key: (len(data), digest(data)) for key, data in objects.items()}
    return CommitRecord({**entries, **changes}).to_bytes()


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


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def paths_in(document: Any, prefix: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place in a JSON document."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for step, value in items:
        yield (*prefix, step)
        if isinstance(value, dict | list):
            yield from paths_in(value, (*prefix, step))


@settings(max_examples=150)
@given(st.data())
def test_any_edit_of_any_metadata_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, objects: Objects, data: st.DataObject
) -> None:
    """One place of one document set to anything: refused in one line, or harmless to read."""
    key = data.draw(st.sampled_from(sorted(key for key in objects if key.endswith("zarr.json"))))
    path = data.draw(st.sampled_from(list(paths_in(json.loads(objects[key])))))
    value = data.draw(JSON_VALUES | st.just(GONE))
    mutated = copy.copy(objects)
    edit(key, path, value)(mutated)
    store = put(tmp_path_factory.mktemp("edited") / "store", mutated)
    message = ""
    with contained(store):
        try:
            GradientStore.open(store).validate()
        except StoreError as error:
            message = str(error)
    assert "\n" not in message
    assert len(message) < 2000


@pytest.mark.parametrize(
    "kind",
    ["root layers.0.name 0", "chunk 6", "array codecs 4", "root version 0", "an array in v2"],
)
@pytest.mark.parametrize("verb", ["verify", "prune"])
def test_the_command_line_exits_with_3(
    tmp_path: Path,
    folder: Path,
    objects: Objects,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    verb: str,
) -> None:
    """One line, exit code 3, nothing written."""
    mutated = copy.copy(objects)
    KINDS[kind](mutated)
    store = put(tmp_path / "store", mutated)
    arguments = ["prune", folder / "model", store, tmp_path / "out"]
    if verb == "verify":
        arguments = ["store", "verify", store]
    assert run_pipe(monkeypatch, *arguments) == 3
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("name", ["[/red]", "[bold]x", "\x1b[31mred", "\ud800", ":bomb:", "a\nb"])
def test_names_are_shown_not_obeyed(
    tmp_path: Path,
    objects: Objects,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    """What a store says of itself is text to `store info`: no markup, no escape codes."""
    mutated = copy.copy(objects)
    edit(ROOT, (*ATTRIBUTES, "model", "name"), name)(mutated)
    store = put(tmp_path / "store", mutated)
    assert run_pipe(monkeypatch, "store", "info", store) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    if name.isprintable():
        assert name in shown


def run_pipe(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of a command run in this process."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["pipe", *map(str, arguments)])
    try:
        gradpipe.cli.main()
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def test_every_change_of_a_byte_is_found(tmp_path: Path, folder: Path, objects: Objects) -> None:
    """600 random changes, truncations and deletions: verify and prune name the object."""
    store = put(tmp_path / "store", objects)
    generator = random.Random(0)
    config = PruneConfig(model=str(folder / "model"), store=str(store), out=tmp_path / "out")
    opened = GradientStore.open(store)
    opened.validate()
    read = read_by_prune(opened)
    for _ in range(600):
        key = generator.choice([*objects, "commit.json"])
        path = store / key
        whole = path.read_bytes()
        damage(path, whole, generator)
        with pytest.raises(GradpipeError, match=key if path.exists() else None):
            GradientStore.open(store).validate()
        if key in read or key == "commit.json":
            with pytest.raises(GradpipeError, match=key if path.exists() else None):
                prune(config)
            assert [path.name for path in tmp_path.iterdir()] == ["store"]
        path.write_bytes(whole)
    opened.validate()


def damage(path: Path, whole: bytes, generator: random.Random) -> None:
    """Change a byte, cut the end off, or delete."""
    place = generator.randrange(len(whole))
    how = generator.randrange(10)
    if how == 0:
        path.unlink()
    elif how < 3:
        path.write_bytes(whole[:place])
    else:
        other = (whole[place] + generator.randrange(1, 256)) % 256
        path.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])


def read_by_prune(store: GradientStore) -> set[str]:
    """Keys of the objects that pruning reads: not the samples, not the groups between."""
    files = store._objects  # noqa: SLF001 (what is read is not said otherwise)
    seen: set[str] = set()
    read = type(files).read

    def noted(reader: Any, key: str, limit: int) -> bytes:
        seen.add(key)
        return read(reader, key, limit)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(files), "read", noted)
        fresh = GradientStore.open(store.url)
        fresh.read(fresh.spec.layers[0], ["grad_l1", "act_l2"])
    return seen
