"""An image classifier is tried on one image before anything is begun."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification

from gradpipe.errors import InputError
from gradpipe.stages.model.own_loss import check_one_image
from tests.models.image_configs import tiny_image_config

CPU = torch.device("cpu")


def built(model_type: str, **changes: Any) -> Any:
    """A toy of a type, its config changed."""
    config = tiny_image_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    return AutoModelForImageClassification.from_config(config).eval()


def test_a_classifier_of_images_passes() -> None:
    """Its loss is the cross-entropy of the image's class."""
    check_one_image(built("vit"), "model", CPU)


@pytest.mark.parametrize(
    ("model_type", "changes", "says"),
    [
        ("levit", {"patch_size": 8}, "cannot run on an image of 3 x 32 x 32 alone: RuntimeError: "),
        ("siglip2", {}, "cannot run on an image of 3 x 32 x 32 alone: "),
        ("vit", {"problem_type": "multi_label_classification"}, "ViTForImageClassification "),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    model_type: str, changes: dict[str, Any], says: str
) -> None:
    """Configs that its own code cannot run, more than an image, and a loss of something else."""
    with pytest.raises(InputError, match=says) as refusal:
        check_one_image(built(model_type, **changes), "model", CPU)
    assert len(str(refusal.value).splitlines()) == 1
