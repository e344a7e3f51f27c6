"""Distilled DeiT, whose class has two heads and takes no labels, goes the way of any classifier."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DeiTForImageClassificationWithTeacher
from transformers.core_model_loading import revert_weight_conversion

from gradpipe import CollectConfig, DataConfig, PruneConfig, collect, prune
from tests.support.vision import save_classifier, write_images

DISTILLED = "DeiTForImageClassificationWithTeacher"


def test_gradients_are_those_of_the_mean_of_both_heads(tmp_path: Path) -> None:
    """The loss is the cross-entropy of the logits that the model classifies with."""
    model = save_classifier("deit", tmp_path / "model", architectures=[DISTILLED])
    images = write_images(tmp_path / "images")
    stores = [
        collect(
            CollectConfig(
                model=str(model),
                store=tmp_path / schedule,
                data=DataConfig(name=str(images)),
                num_samples=4,
                batch_size=3,
                statistics=("grad_l1",),
                encoding="float32",
                schedule=schedule,
            )
        )
        for schedule in ("resident", "streamed")
    ]
    assert stores[0].digest == stores[1].digest
    samples: Any = stores[0].spec.samples
    loaded: Any = DeiTForImageClassificationWithTeacher.from_pretrained(model)
    arrays = {n: torch.from_numpy(x) for n, x in stores[0].calibration().arrays.items()}
    expected = {name: torch.zeros_like(x) for name, x in loaded.eval().named_parameters()}
    for pixels, label in zip(arrays["pixel_values"], arrays["labels"], strict=True):
        loaded.zero_grad()
        logits_1C = loaded(pixel_values=pixels.reshape(1, *samples.image_shape)).logits
        cross_entropy(logits_1C, label[None]).backward()
        for name, parameter in loaded.named_parameters():
            expected[name] += parameter.grad.abs()
    expected = revert_weight_conversion(loaded, expected)  # names as the checkpoint has them
    for layer in stores[0].spec.layers:
        got = torch.from_numpy(np.array(stores[0].read_norms(layer, "grad_l1")))
        torch.testing.assert_close(got, expected[layer.weight_key], rtol=1e-4, atol=1e-6)
    settings = PruneConfig(
        model=str(model),
        store=str(tmp_path / "resident"),
        out=tmp_path / "out",
        method="gradient",
    )
    (result,) = prune(settings)
    assert result.achieved == pytest.approx(0.5)
