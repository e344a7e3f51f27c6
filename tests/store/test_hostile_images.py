"""Stores of images that were tampered with: their shapes, pixels and labels are not trusted."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gradpipe import GradientStore, StoreError
from gradpipe.store.arrays import encode_array
from gradpipe.store.objects import CommitRecord, digest
from gradpipe.store.schema import SampleSpec
from tests.support.cases import VIT, Shelf
from tests.support.vision import SIZE


@pytest.fixture(scope="module")
def store(shelf: Shelf) -> GradientStore:
    """Of a ViT, intact."""
    return shelf.store(VIT)


def honest(folder: Path, store: GradientStore) -> Path:
    """A copy of a store."""
    return Path(shutil.copytree(store.url, folder / "store"))


def forge(store: Path, edits: dict[str, object], arrays: dict[str, np.ndarray]) -> GradientStore:
    """Change fields of the samples and arrays of a store, and make its record fit."""
    root = json.loads((store / "zarr.json").read_text())
    spec = root["attributes"]["gradpipe"]
    for name, value in edits.items():
        (spec if name == "objective" else spec["samples"])[name] = value
    (store / "zarr.json").write_text(json.dumps(root))
    for name, array in arrays.items():
        for part, data in encode_array(array).items():
            (store / "calibration" / name / part).write_bytes(data)
    record = CommitRecord.from_bytes((store / "commit.json").read_bytes())
    contents = {key: (store / key).read_bytes() for key in record.objects}
    fitting = CommitRecord({key: (len(data), digest(data)) for key, data in contents.items()})
    (store / "commit.json").write_bytes(fitting.to_bytes())
    return GradientStore.open(store)


@pytest.mark.parametrize(
    "edits",
    [
        {"image_shape": None},
        {"objective": "causal-lm"},
        {"image_shape": [3, SIZE]},
        {"image_shape": [3, SIZE, SIZE, 1]},
        {"image_shape": [3, SIZE, 0]},
        {"image_shape": [3, SIZE, -SIZE]},
        {"image_shape": [3, SIZE, 2 * SIZE]},
        {"image_shape": [3, 2**40, 2**40]},
        {"image_shape": [2**15, 2**15, 2**15]},
        {"image_shape": [3, SIZE, 16.0]},
        {"image_shape": "3x16x16"},
        {"image_shape": 10**30},
        {"num_samples": 2**30},
        {"seq_len": 0},
        {"digest": ""},
        {"digest": "0" * 32},
    ],
)
def test_a_forged_spec_is_refused(
    tmp_path: Path, store: GradientStore, edits: dict[str, object]
) -> None:
    """Shapes that are none, or not the arrays', never reach an allocation."""
    with pytest.raises(StoreError):
        forge(honest(tmp_path, store), edits, {}).validate()


@pytest.mark.parametrize("name", ["pixel_values", "labels", "sources"])
def test_forged_samples_are_refused(tmp_path: Path, store: GradientStore, name: str) -> None:
    """Pixels or labels of another type, number or content are not the spec's."""
    arrays = store.calibration().arrays
    copy = honest(tmp_path, store)
    forged = [arrays[name][:-1], arrays[name].astype(np.int32)]
    if name != "sources":
        forged.append(arrays[name] + 1)
    for array in forged:
        with pytest.raises(StoreError, match=f"calibration/.*{name}"):
            forge(copy, {}, {name: np.ascontiguousarray(array)}).validate()


def test_negative_labels_are_refused(tmp_path: Path, store: GradientStore) -> None:
    """The label that losses ignore, −100, would make a sample of nothing."""
    arrays = store.calibration().arrays
    labels = np.full_like(arrays["labels"], -100)
    fitting = digest(arrays["pixel_values"].tobytes() + labels.tobytes())
    with pytest.raises(StoreError, match="negative"):
        forge(honest(tmp_path, store), {"digest": fitting}, {"labels": labels}).validate()


def test_a_spec_without_an_image_shape_is_of_text() -> None:
    """Stores of before have no such field."""
    document = {
        "dataset": "text",
        "revision": None,
        "sampling": "document",
        "seed": 0,
        "num_samples": 2,
        "seq_len": 3,
        "digest": "0" * 32,
    }
    spec = SampleSpec.from_json(document)
    assert spec.image_shape is None
    assert spec.arrays() == {"input_ids": ((2, 3), "int32"), "sources": ((2, 2), "int64")}
