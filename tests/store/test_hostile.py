"""Stores that were tampered with: always a GradpipeError, never code, memory or another file.

Two attackers. One changes bytes, and is found by the digests. The other writes a commit record that
fits what was changed, and is found by what the bytes say.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradpipe import GradientStore, GradpipeError, PruneConfig, StoreError, prune
from tests.store.corpus import (
    ACT,
    ATTRIBUTES,
    GONE,
    KINDS,
    L1,
    ROOT,
    VALUES,
    Objects,
    edit,
    put,
    remove,
    replace,
)
from tests.support.contained import contained
from tests.support.workplace import run_pipe


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
    files = store.objects
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
