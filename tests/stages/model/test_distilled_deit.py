"""Distilled DeiT, whose class has two heads and takes no labels, goes the way of any classifier."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import DeiTForImageClassificationWithTeacher

from gradpipe import DataConfig, collect, prune
from tests.support.autograd import gradient_sums, of_layer
from tests.support.cases import collecting, pruning
from tests.support.vision import save_classifier, write_images

DISTILLED = "DeiTForImageClassificationWithTeacher"


def test_gradients_are_those_of_the_mean_of_both_heads(tmp_path: Path) -> None:
    """The loss is the cross-entropy of the logits that the model classifies with."""
    model = save_classifier("deit", tmp_path / "model", architectures=[DISTILLED])
    options: dict[str, Any] = {
        "data": DataConfig(name=str(write_images(tmp_path / "images"))),
        "seq_len": None,
        "batch_size": 3,
        "statistics": ("grad_l1",),
    }
    store, streamed = (
        collect(collecting(tmp_path, tmp_path / schedule, schedule=schedule, **options))
        for schedule in ("resident", "streamed")
    )
    assert store.digest == streamed.digest
    arrays, shape = dict(store.calibration().arrays), store.spec.samples.image_shape
    assert shape is not None
    arrays["pixel_values"] = arrays["pixel_values"].reshape(-1, *shape)
    loaded = DeiTForImageClassificationWithTeacher.from_pretrained(model)
    expected = gradient_sums(loaded, arrays)
    for layer in store.spec.layers:
        got = store.read_norms(layer, "grad_l1")
        np.testing.assert_allclose(got, of_layer(expected, layer), rtol=1e-4, atol=1e-6)
    run = pruning(tmp_path, tmp_path / "out", store=store.url, method="gradient")
    (result,) = prune(run)
    assert result.achieved == pytest.approx(0.5)
