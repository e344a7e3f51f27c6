"""Tiny random models of any type that transformers builds, as complete folders.

Why: the families of `models` are known well and few; users bring all of them. Sizes are those of
the matrix of model types.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.models.configs import tiny_config
from tests.support.models import tiny_tokenizer


def save_architecture(
    model_type: str, folder: Path, *, kind: str | None = None, seed: int = 0, **changes: Any
) -> Path:
    """Write a tiny random model of the type as a complete folder, and return it.

    `kind` is the name of its class; None: the type's causal language model. `changes` are options
    of its config.
    """
    config = tiny_config(model_type, **changes)
    with torch.random.fork_rng(devices=[]):  # construction draws from the global generator
        torch.manual_seed(seed)
        if kind is None:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        else:
            model = getattr(transformers, kind)(config)
    filled(model, 0.25, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def filled(model: Any, scale: float, seed: int = 0) -> Any:
    """The model in eval mode, its matrices drawn anew: large enough that nothing is degenerate."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()
