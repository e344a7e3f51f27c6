"""A tiny config of every model type that transformers builds as an image classifier.

Images are of 32 × 32 pixels and three channels, and there are three classes. What a type needs
beside the common sizes stands in `_CHANGES`.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import AutoConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.vision import CLASSES

SIZE = 32

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "image_size": SIZE,
    "patch_size": 8,
}

_STAGES = [2, 2]  # blocks of each

_VISION = {**_COMMON, "projection_dim": 32}

_TEXT = {**_COMMON, "vocab_size": 64, "max_position_embeddings": 16, "projection_dim": 32}

_SWIN: dict[str, Any] = {
    "embed_dim": 16,
    "depths": _STAGES,
    "num_heads": [2, 4],
    "window_size": 4,
    "patch_size": 4,
}

_PYRAMID: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": _STAGES,
    "sr_ratios": [2, 1],
    "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
}

_CHANGES: dict[str, dict[str, Any]] = {
    "bit": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": _STAGES, "num_groups": 4},
    "clip": {"vision_config": _VISION, "text_config": _TEXT, "projection_dim": 32},
    "convnext": {"num_stages": 2, "hidden_sizes": [16, 32], "depths": _STAGES, "patch_size": 4},
    "convnextv2": {"num_stages": 2, "hidden_sizes": [16, 32], "depths": _STAGES, "patch_size": 4},
    "cvt": {"embed_dim": [16, 32, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
    "dinat": {"embed_dim": 16, "depths": _STAGES, "num_heads": [2, 4], "kernel_size": 3},
    "donut-swin": _SWIN,
    "efficientnet": {"hidden_dim": 64, "width_coefficient": 0.25, "depth_coefficient": 0.25},
    "focalnet": {
        "embed_dim": 16,
        "hidden_sizes": [16, 32],
        "depths": _STAGES,
        "focal_levels": [2, 2],
        "focal_windows": [3, 3],
        "patch_size": 4,
    },
    "hgnet_v2": {
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 32, 64],
        "stem_channels": [3, 8, 16],
        "stage_in_channels": [16, 16, 32, 32],
        "stage_mid_channels": [8, 8, 16, 16],
        "stage_out_channels": [16, 32, 32, 64],
        "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "hiera": {
        "patch_size": [7, 7],
        "embed_dim": 16,
        "image_size": [SIZE, SIZE],
        "depths": _STAGES,
        "num_heads": [1, 2],
        "num_query_pool": 1,
        "masked_unit_attention": [True, False],
        "masked_unit_size": [4, 4],
    },
    "imagegpt": {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 65, "n_positions": 64},
    "levit": {
        "patch_size": 16,
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [2, 2, 2],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
    },
    "metaclip_2": {"vision_config": _VISION, "text_config": _TEXT, "projection_dim": 32},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
        "patch_size": 1,
    },
    "mobilevitv2": {"width_multiplier": 0.25, "patch_size": 1},
    "perceiver": {
        "num_latents": 8,
        "d_latents": 32,
        "d_model": 32,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 1,
        "image_size": SIZE,
    },
    "poolformer": {
        "num_encoder_blocks": 2,
        "depths": _STAGES,
        "hidden_sizes": [16, 32],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "padding": [2, 1],
    },
    "pvt": {**_PYRAMID, "sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2]},
    "pvt_v2": _PYRAMID,
    "regnet": {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": _STAGES, "groups_width": 8},
    "resnet": {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": _STAGES},
    "segformer": _PYRAMID,
    "shieldgemma2": {
        "text_config": {**_TEXT, "num_key_value_heads": 2, "head_dim": 8},
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 5,
        "boi_token_index": 6,
        "eoi_token_index": 7,
    },
    "siglip": {"vision_config": _VISION, "text_config": _TEXT},
    "siglip2": {"vision_config": {**_VISION, "num_patches": 16}, "text_config": _TEXT},
    "swiftformer": {"depths": [1, 1], "embed_dims": [16, 32], "downsamples": [True, True]},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "textnet": {"stem_out_channels": 16, "hidden_sizes": [16] * 5, "image_size": [SIZE, SIZE]},
    "timm_wrapper": {"architecture": "resnet10t", "num_classes": len(CLASSES)},
}


def tiny_image_config(model_type: str) -> Any:
    """The type's tiny config: the common sizes under the names that it has, and its own."""
    kind = CONFIG_MAPPING[model_type]
    fields = {*inspect.signature(kind.__init__).parameters}
    fields |= set(getattr(kind, "__dataclass_fields__", {}))
    options = {name: value for name, value in _COMMON.items() if name in fields}
    names = {
        "id2label": dict(enumerate(CLASSES)),
        "label2id": {x: i for i, x in enumerate(CLASSES)},
    }
    found = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[model_type]
    names["architectures"] = [found if isinstance(found, str) else found[0]]
    return AutoConfig.for_model(model_type, **{**options, **_CHANGES.get(model_type, {}), **names})
