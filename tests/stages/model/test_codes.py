"""Codes of a quantization are decoded by transformers, or refused: never read as weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.workplace import (
    COLLECT,
    EVAL,
    KEY,
    PRUNE,
    Refused,
    edit_config,
    edit_weights,
    succeed,
)


def _quantize(tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    weight = tensors[KEY]
    scale = weight.abs().max() / 100
    tensors[KEY] = (weight / scale).to(dtype)
    tensors[f"{KEY}_scale"] = scale.reshape(1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_codes_that_the_config_does_not_name_are_refused(
    refused: Refused, workplace: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """With the tensor and its type."""
    model = shutil.copytree(workplace / "model", tmp_path / "model")
    edit_weights(model, lambda tensors: _quantize(tensors, dtype))
    says = (KEY.removesuffix(".weight") + " is of type ", "before it was quantized")
    refused(EVAL.replace("model", str(model), 1), says=says)


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"quant_method": "of-tomorrow", "bits": 3}, "does not know the quantization_config"),
        ({"bits": 3}, "quant_method"),
        ("int8", "transformers cannot"),
    ],
)
def test_a_method_that_transformers_does_not_know_is_refused(
    refused: Refused, workplace: Path, tmp_path: Path, quantization: Any, says: str
) -> None:
    """It would go on without decoding anything."""
    model = shutil.copytree(workplace / "model", tmp_path / "model")
    edit_config(model, quantization_config=quantization)
    refused(EVAL.replace("model", str(model), 1), says=(str(model), says))


def test_a_config_of_a_quantization_is_refused_by_both_stages(
    refused: Refused, workplace: Path, tmp_path: Path
) -> None:
    """Also where the tensors are floats: loading would quantize what was pruned."""
    model = shutil.copytree(workplace / "model", tmp_path / "model")
    edit_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    for command in (COLLECT, PRUNE):
        refused(command.replace("model", str(model), 1), says=("is quantized (gptq", "before it"))


def test_whole_numbers_where_the_model_has_them_are_no_codes(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GPT-2's masks in old checkpoints, which transformers passes by."""
    model = shutil.copytree(workplace / "other-names", tmp_path / "model")
    mask = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    add: Callable[[dict[str, Tensor]], object] = lambda x: x.update({"h.0.attn.bias": mask})  # noqa: E731
    edit_weights(model, add)
    monkeypatch.chdir(workplace)
    values = []
    for name in ("other-names", str(model)):
        succeed(f"{EVAL.replace('model', name, 1)} --json {tmp_path}/eval.json", monkeypatch)
        values.append(json.loads((tmp_path / "eval.json").read_text())["perplexity"])
    assert values[0] == values[1]
