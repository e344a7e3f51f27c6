"""The store: round trips, golden layout, damage, and what other readers see."""

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from gradpipe.errors import GradpipeError, InputError, StoreError
from gradpipe.store import arrays
from gradpipe.store import folder as folders
from gradpipe.store.folder import is_begun, is_complete
from gradpipe.store.objects import CommitRecord, ObjectWriter, digest
from gradpipe.store.reader import GradientStore
from gradpipe.store.schema import FORMAT_VERSION, StoreSpec
from gradpipe.store.statistics import STATISTICS, Sums
from gradpipe.store.writer import StoreWriter
from tests.support.stores import INPUT_IDS, toy_layer, toy_spec, write_toy

LAYER = toy_layer("model.layers.0.mlp.up_proj", (6, 4))
GOLDEN_DIGEST = "81444a3b1e6397e44b8d839cf3d3a662"
GOLDEN_NORMS = {
    "grad_l1": "2b56faec99c041924edee21bb69f8449",
    "grad_l2": "2b56faec99c041924edee21bb69f8449",
    "act_l2": "3733ac6728cbab21fb9affc6d90fac67",
}


def spec(encoding: str = "float32") -> StoreSpec:
    """A store of one layer."""
    return toy_spec([LAYER], ("grad_l1", "grad_l2", "act_l2"), encoding=encoding)


def sums() -> dict[str, Sums]:
    """Over many orders of magnitude, zeros among them."""
    generator = np.random.default_rng(0)
    g = np.exp(generator.normal(-9, 2, LAYER.shape)).astype(np.float32)
    g[0] = 0
    x = np.exp(generator.normal(0, 1, 4)).astype(np.float32)
    return {"grad_l1": g, "grad_l2": (g * g).astype(np.float32), "act_l2": x}


def write_store(folder: Path, encoding: str = "float32") -> Path:
    """A finished store."""
    return write_toy(folder, spec(encoding), {LAYER.name: sums()})


@given(
    st.sampled_from(arrays.DTYPES),
    st.lists(st.integers(1, 40), min_size=1, max_size=2),
    st.integers(0, 2**31),
)
def test_arrays_come_back_as_they_went(dtype: str, shape: list[int], seed: int) -> None:
    """Any dtype and shape of the format survives encoding, to the bit."""
    array = np.random.default_rng(seed).integers(0, 250, shape).astype(dtype)
    objects = arrays.encode_array(array)
    data = next(value for key, value in objects.items() if key != "zarr.json")
    back = arrays.decode_array(objects["zarr.json"], data, tuple(shape), dtype)
    assert back.dtype == array.dtype
    assert np.array_equal(back, array)


@pytest.mark.parametrize(
    ("encoding", "rtol"), [("float32", 0.0), ("float16", 1e-3), ("compact", 2.2e-2)]
)
def test_a_store_gives_back_its_norms(tmp_path: Path, encoding: str, rtol: float) -> None:
    """float32 is exact; the others are within their precision, zeros exact in all."""
    store = GradientStore.open(write_store(tmp_path / encoding, encoding))
    assert store.spec == spec(encoding)
    store.validate()
    for statistic, exact in sums().items():
        norms = STATISTICS[statistic].norm_of(exact)
        got = store.read_norms(LAYER, statistic)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, norms, rtol=rtol, atol=norms.max() * 2**-24)
        assert (got[norms == 0] == 0).all()


def test_any_zarr_reader_opens_it(tmp_path: Path) -> None:
    """Arrays are plain Zarr v3 numbers; the spec is in the root group's attributes."""
    group = zarr.open_group(write_store(tmp_path / "store"), mode="r")
    values = group["layers/model.layers.0.mlp.up_proj/act_l2/values"]
    assert isinstance(values, zarr.Array)
    assert np.array_equal(np.asarray(values[...]), sums()["act_l2"])
    assert group.metadata.consolidated_metadata is not None
    attributes = group.attrs["gradpipe"]
    assert isinstance(attributes, dict)
    assert attributes["version"] == FORMAT_VERSION


def test_a_store_without_its_commit_record_is_unfinished(tmp_path: Path) -> None:
    """The record is written last: whatever lacks it is not a store yet."""
    folder = write_store(tmp_path / "store")
    assert is_complete(folder)
    (folder / "commit.json").unlink()
    assert not is_complete(folder)
    assert not is_begun(folder)
    with pytest.raises(StoreError, match="incomplete"):
        GradientStore.open(folder)
    with pytest.raises(InputError, match="no store"):
        GradientStore.open(tmp_path / "nothing")


def test_a_store_is_incomplete_as_soon_as_it_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while its objects are removed, it does not pass for the whole that it was."""
    write_store(tmp_path / "store")
    assert is_complete(tmp_path / "store")
    monkeypatch.setattr(folders, "remove_strays", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        folders.clear(tmp_path / "store")
    assert not is_complete(tmp_path / "store")


def test_files_of_others_stay(tmp_path: Path) -> None:
    """A model card, or a clone's `.git`, is not a store's to remove, nor read by anyone."""
    folder = write_store(tmp_path / "store")
    (folder / ".git").mkdir()
    for name in ("README.md", ".git/HEAD"):
        (folder / name).write_text("mine")
    (folder / "layers" / "stray").write_text("left by a kill")
    folders.tidy(folder)
    assert not (folder / "layers" / "stray").exists()
    GradientStore.open(folder).validate()
    folders.clear(folder)
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")) == [
        *(".git", ".git/HEAD", "README.md")
    ]


@pytest.mark.parametrize(
    ("names", "free"),
    [
        ([], True),
        ([".lock"], True),
        ([".lock", ".zarr.json.tmp"], True),
        ([".lock", "thesis.txt"], False),
        (["zarr.json"], False),
        (["thesis.txt"], False),
    ],
)
def test_only_what_a_killed_run_leaves_is_free(
    tmp_path: Path, names: list[str], *, free: bool
) -> None:
    """A folder is begun in if it is empty, or holds nothing but a killed run's first files."""
    for name in names:
        (tmp_path / name).write_text("{}")
    assert folders.is_free(tmp_path) == free


def test_a_store_is_not_committed_without_a_layer(tmp_path: Path) -> None:
    """What was not written cannot be declared complete."""
    writer = StoreWriter(tmp_path, spec())
    writer.begin(None)
    with pytest.raises(GradpipeError, match=r"grad_l1 of .*up_proj has vanished"):
        writer.commit()
    assert not is_complete(tmp_path)


def test_a_statistic_that_was_not_collected_is_no_damage(tmp_path: Path) -> None:
    """Asked for what it never held, a store says what it does hold."""
    write_store(tmp_path / "store")
    store = GradientStore.open(tmp_path / "store")
    with pytest.raises(InputError, match=r"has no hessian, it has grad_l1, grad_l2, act_l2"):
        store.read_norms(LAYER, "hessian")


def test_specs_survive_json_and_refuse_what_is_not_theirs() -> None:
    """Every field is checked for presence and type on the way back."""
    document = json.loads(json.dumps(spec().to_json()))
    assert StoreSpec.from_json(document) == spec()
    for field in document:
        if field != "couplings":  # it may be absent
            with pytest.raises(StoreError):
                StoreSpec.from_json({k: v for k, v in document.items() if k != field})
        with pytest.raises(StoreError):
            StoreSpec.from_json({**document, field: {"not": "this"}})
    with pytest.raises(StoreError, match="unknown fields"):
        StoreSpec.from_json({**document, "extra": 1})
    with pytest.raises(StoreError, match="upgrade"):
        StoreSpec.from_json({**document, "version": 99})


def test_a_commit_record_is_canonical() -> None:
    """A record reads back as it was, and as nothing but the bytes that were written."""
    record = CommitRecord({"a/b": (3, "0" * 32), "c": (0, "f" * 32)})
    assert CommitRecord.from_bytes(record.to_bytes()) == record
    with pytest.raises(StoreError, match="damaged"):
        CommitRecord.from_bytes(record.to_bytes() + b" ")
    with pytest.raises(StoreError, match="damaged"):
        CommitRecord.from_bytes(b"[" * 100_000)


def test_a_failed_write_is_one_clear_error(tmp_path: Path) -> None:
    """A file where a folder should be names the path, and leaves no temporary file."""
    (tmp_path / "layers").write_text("in the way")
    with pytest.raises(GradpipeError, match="cannot write"):
        ObjectWriter(tmp_path).write("layers/x", b"data")
    assert [p.name for p in tmp_path.iterdir()] == ["layers"]


def test_every_later_version_reads_the_golden_store() -> None:
    """A finished version-1 store, kept as bytes: its norms come back, to the bit, for ever."""
    store = GradientStore.open(Path(__file__).parents[1] / "data" / "store-v1")
    store.validate()
    assert store.digest == GOLDEN_DIGEST
    assert store.spec == replace(spec("compact"), version=1)
    np.testing.assert_array_equal(store.input_ids(), INPUT_IDS)
    assert {s: digest(store.read_norms(LAYER, s).tobytes()) for s in store.spec.statistics} == (
        GOLDEN_NORMS
    )
