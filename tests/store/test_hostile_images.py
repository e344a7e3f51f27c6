"""Stores of images that were tampered with: their shapes, pixels and labels are not trusted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradpipe import GradientStore, StoreError
from gradpipe.store.arrays import encode_array
from gradpipe.store.objects import digest
from gradpipe.store.schema import SampleSpec
from tests.store.corpus import ATTRIBUTES, ROOT, edit, put
from tests.support.cases import VIT, Shelf, files_of
from tests.support.vision import SIZE


@pytest.fixture(scope="module")
def store(shelf: Shelf) -> GradientStore:
    """Of a ViT, intact."""
    return shelf.store(VIT)


def forged(
    folder: Path, store: GradientStore, edits: dict[str, object], **arrays: np.ndarray[Any, Any]
) -> GradientStore:
    """A copy with other fields of the samples and other arrays, and a record that fits."""
    objects = {k: v for k, v in files_of(Path(store.url)).items() if k != "commit.json"}
    for name, value in edits.items():
        steps = (name,) if name == "objective" else ("samples", name)
        edit(ROOT, (*ATTRIBUTES, *steps), value)(objects)
    for name, array in arrays.items():
        parts = encode_array(np.ascontiguousarray(array))
        objects |= {f"calibration/{name}/{part}": data for part, data in parts.items()}
    return GradientStore.open(put(folder / "store", objects))


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
        forged(tmp_path, store, edits).validate()


@pytest.mark.parametrize("name", ["pixel_values", "labels", "sources"])
def test_forged_samples_are_refused(tmp_path: Path, store: GradientStore, name: str) -> None:
    """Pixels or labels of another type, number or content are not the spec's."""
    arrays = store.calibration().arrays
    others = [arrays[name][:-1], arrays[name].astype(np.int32)]
    if name != "sources":
        others.append(arrays[name] + 1)
    for array in others:
        with pytest.raises(StoreError, match=f"calibration/.*{name}"):
            forged(tmp_path, store, {}, **{name: array}).validate()


def test_negative_labels_are_refused(tmp_path: Path, store: GradientStore) -> None:
    """The label that losses ignore, −100, would make a sample of nothing."""
    arrays = store.calibration().arrays
    labels = np.full_like(arrays["labels"], -100)
    fitting = digest(arrays["pixel_values"].tobytes() + labels.tobytes())
    with pytest.raises(StoreError, match="negative"):
        forged(tmp_path, store, {"digest": fitting}, labels=labels).validate()


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
