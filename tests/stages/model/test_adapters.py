"""Adapters: alone, among the weights, and wrapped around them, they are refused with what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from tests.support.workplace import COLLECT, KEY, Refused, edit_weights

_NAME = KEY.removesuffix(".weight")


def _add_beside(tensors: dict[str, Tensor]) -> None:
    rows, columns = tensors[KEY].shape
    tensors[f"{_NAME}.lora_A.weight"] = torch.ones(2, columns)
    tensors[f"{_NAME}.lora_B.weight"] = torch.ones(rows, 2)


def _wrap(tensors: dict[str, Tensor]) -> None:
    tensors[f"{_NAME}.base_layer.weight"] = tensors.pop(KEY)


def test_an_adapter_beside_the_weights_is_refused(
    refused: Refused, workplace: Path, tmp_path: Path
) -> None:
    """Transformers would leave it out, and the gradients would be of another model."""
    model = shutil.copytree(workplace / "model", tmp_path / "model")
    edit_weights(model, _add_beside)
    says = (f"{_NAME}.lora_A.weight", "merge it into them")
    refused(COLLECT.replace("model", str(model), 1), says=says)


def test_weights_inside_an_adapter_are_refused(
    refused: Refused, workplace: Path, tmp_path: Path
) -> None:
    """They have other names than the model's."""
    model = shutil.copytree(workplace / "model", tmp_path / "model")
    edit_weights(model, _wrap)
    says = (f"{_NAME}.base_layer.weight", "merge_and_unload")
    refused(COLLECT.replace("model", str(model), 1), says=says)


def test_an_adapter_alone_is_refused(refused: Refused, tmp_path: Path) -> None:
    """It is no model."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    says = ("is an adapter alone", "merge it into the model")
    refused(COLLECT.replace("model", str(tmp_path / "adapter"), 1), says=says)
