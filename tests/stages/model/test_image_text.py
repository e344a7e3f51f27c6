"""Models of images and text: their language model is calibrated on text; the tower stays dense."""

import copy
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from rich.console import Console
from safetensors.torch import load_file

from gradpipe import collect, prune
from tests.support.architectures import filled
from tests.support.autograd import gradient_sums, of_layer
from tests.support.cases import collecting, pruning
from tests.support.models import VOCAB_SIZE, tiny_tokenizer
from tests.support.texts import write_text

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 56,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
}
_QWEN_TEXT = _TEXT | {
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
}
_QWEN_IMAGES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "depth": 3,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 14,
}
_TOKENS: dict[str, Any] = {"image_token_id": 90, "video_token_id": 91}
_IMAGES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}

MODELS: Mapping[str, Callable[[], Any]] = {
    "qwen2_5_vl": lambda: hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(
            text_config=_QWEN_TEXT,
            vision_config=_QWEN_IMAGES | {"fullatt_block_indexes": [1]},
            **_TOKENS,
        )
    ),
    "qwen3_vl": lambda: hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(
            text_config=_QWEN_TEXT,
            vision_config=_QWEN_IMAGES | {"deepstack_visual_indexes": [0, 1]},
            **_TOKENS,
        )
    ),
    "qwen3_vl_moe": lambda: hf.Qwen3VLMoeForConditionalGeneration(
        hf.Qwen3VLMoeConfig(
            text_config=_QWEN_TEXT
            | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
            vision_config=_QWEN_IMAGES | {"deepstack_visual_indexes": [0, 1]},
            **_TOKENS,
        )
    ),
    "llava": lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config={"model_type": "llama", **_TEXT},
            vision_config={"model_type": "clip_vision_model", **_IMAGES},
            image_token_index=90,
        )
    ),
    "mllama": lambda: hf.MllamaForConditionalGeneration(
        hf.MllamaConfig(
            text_config=_TEXT | {"num_hidden_layers": 3, "cross_attention_layers": [1]},
            vision_config={
                **{k: _IMAGES[k] for k in ("hidden_size", "intermediate_size", "image_size")},
                **dict.fromkeys(("num_hidden_layers", "attention_heads"), 2),
                "patch_size": 14,
                "num_global_layers": 1,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [0],
                "max_num_tiles": 2,
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            },
            image_token_index=90,
        )
    ),
    "mistral3": lambda: hf.Mistral3ForConditionalGeneration(
        hf.Mistral3Config(
            text_config={"model_type": "mistral", **_TEXT},
            vision_config={"model_type": "pixtral", **_IMAGES},
            image_token_index=90,
        )
    ),
}


def save(kind: str, folder: Path) -> Any:
    """A random model and its tokenizer; returns the model."""
    with torch.random.fork_rng(devices=[]):
        model = filled(MODELS[kind](), 0.25)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return copy.deepcopy(model)


@pytest.mark.parametrize(
    ("kind", "blocks"),
    [*((kind, None) for kind in MODELS), ("mllama", "model.layers")],
)
def test_the_language_model_is_collected_and_pruned(
    kind: str, blocks: str | None, tmp_path: Path
) -> None:
    """Exact under both schedules; what reads images stays dense, aloud; transformers opens it."""
    model = save(kind, tmp_path / "model")
    write_text(tmp_path / "text.txt")
    said, stores = io.StringIO(), {}
    for schedule in ("resident", "streamed"):
        settings = collecting(
            tmp_path,
            tmp_path / schedule,
            blocks=blocks,
            num_samples=3,
            batch_size=2,
            statistics=("grad_l1",),
            schedule=schedule,
        )
        stores[schedule] = collect(settings, Console(file=said, width=200))
    store = stores["resident"]
    assert store.digest == stores["streamed"].digest
    of_block = 4 + 4 * 2 if kind == "qwen3_vl_moe" else 7  # attention, and each expert's
    assert len(store.spec.layers) == 2 * of_block
    if kind != "mllama":  # whose class for text leaves its tower in the file
        assert "stays dense: model.vis" in said.getvalue()
    expected = gradient_sums(model, store.calibration().arrays)
    for layer in store.spec.layers:
        got = store.read_norms(layer, "grad_l1")
        np.testing.assert_allclose(got, of_layer(expected, layer), rtol=1e-4, atol=1e-5)
    run = pruning(tmp_path, tmp_path / "out", store=store.url, method="gradient")
    (result,) = prune(run, Console(file=said, width=200))
    assert re.search(r"stays dense: \S*vis\S*, [\d,]+ weights: the store has no", said.getvalue())
    assert result.achieved == pytest.approx(0.5)
    dense = load_file(tmp_path / "model" / "model.safetensors")
    for key, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        if key not in {x.weight_key for x in store.spec.layers}:
            assert torch.equal(tensor, dense[key]), key
    opened: Any = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not opened[1]["missing_keys"]
