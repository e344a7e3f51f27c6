"""Tiny random image classifiers, and images to classify, as folders and as tables.

What: a ViT and a DeiT of 2 blocks and hidden width 32 for images of 16 × 16 pixels, with weights
large enough that nothing is degenerate; noise images as PNG.
Why: tests run on real `transformers` modelling code and image processors, and offline.
Source: the architectures are those of `transformers`, the shapes our own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

CLASSES = ("circle", "cross", "square")
SIZE = 16

_CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "image_size": SIZE,
    "patch_size": 4,
    "id2label": dict(enumerate(CLASSES)),
    "label2id": {name: i for i, name in enumerate(CLASSES)},
}
_PROCESSORS: dict[str, Any] = {
    "vit": ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}),
    "deit": DeiTImageProcessorPil(
        size={"height": SIZE + 4, "width": SIZE + 4}, crop_size={"height": SIZE, "width": SIZE}
    ),
}
FAMILIES = tuple(_PROCESSORS)
_ARCHITECTURES = {"vit": "ViTForImageClassification", "deit": "DeiTForImageClassification"}
NUM_TOKENS = {"vit": 17, "deit": 18}  # 16 patches, a class token, DeiT's distillation token


def tiny_classifier(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The family's tiny float32 model in eval mode; the same seed gives the same weights."""
    options = {"architectures": [_ARCHITECTURES[family]], **_CONFIG, **changes}
    config = AutoConfig.for_model(family, **options)
    model: PreTrainedModel = AutoModelForImageClassification.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 1.5 / 32**0.5 if parameter.ndim == 2 else 0.2
            parameter.copy_(noise * scale if parameter.ndim > 1 else parameter + noise * scale)
    model.eval()
    return model


def save_classifier(
    family: str, folder: Path, *, max_shard_size: int | str = "5GB", **changes: Any
) -> Path:
    """Write the tiny model and its image processor's config, and return the folder."""
    tiny_classifier(family, **changes).save_pretrained(folder, max_shard_size=max_shard_size)
    _PROCESSORS[family].save_pretrained(folder)
    return folder


def write_images(folder: Path, count: int = 4, names: tuple[str, ...] = CLASSES) -> Path:
    """`count` PNG files of noise for each class, of different sizes; returns the folder."""
    generator = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            height, width = generator.integers(18, 30, 2)
            pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02}.png")
    return folder


def image_table(folder: Path, names: tuple[str, ...] = CLASSES) -> datasets.Dataset:
    """The images of such a folder, in the same order, with a column of class labels."""
    files = [(name, file) for name in names for file in sorted((folder / name).iterdir())]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    )
    columns = {
        "image": [{"bytes": file.read_bytes(), "path": None} for _, file in files],
        "label": [names.index(name) for name, _ in files],
    }
    return datasets.Dataset.from_dict(columns, features=features)
