"""What a store's ℓ1 norms of gradients should be, by autograd of any of transformers' models.

For models that `reference` has no table for. The loss is written by hand, from the logits. Nothing
of gradpipe is used.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.core_model_loading import revert_weight_conversion


def gradient_sums(model: Any, samples: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
    """Tensor of the checkpoint -> sum over samples of |dL/dW|, one sample at a time.

    `samples` are `input_ids` (N, T), or `pixel_values` (N, C, H, W) and `labels` (N,).
    """
    for parameter in model.eval().parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    sums: dict[str, Tensor] = {}
    for loss in _losses(model, {name: torch.from_numpy(x) for name, x in samples.items()}):
        model.zero_grad()
        loss.backward(retain_graph=True)  # LeViT keeps what it makes of its biases for later passes
        gradients = {
            name: torch.zeros_like(x) if x.grad is None else x.grad.clone()
            for name, x in model.named_parameters()
        }
        for key, gradient in revert_weight_conversion(model, gradients).items():
            sums[key] = sums.get(key, 0) + gradient.abs()
    return sums


def of_layer(sums: Mapping[str, Tensor], layer: Any) -> npt.NDArray[Any]:
    """Those of one layer of a store, (out, in): its part of a tensor, turned as it says."""
    found = sums[layer.weight_key]
    if layer.part is not None:
        index, count = layer.part
        found = found.reshape(count, -1, found.shape[-1])[index]
    return np.asarray(found.T if layer.transposed else found)


def _losses(model: Any, samples: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """The loss of each sample."""
    if "input_ids" in samples:
        for ids_T in samples["input_ids"].long():
            logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0]
            yield cross_entropy(logits_TV[:-1], ids_T[1:])
        return
    for pixels_CHW, label in zip(samples["pixel_values"], samples["labels"], strict=True):
        yield cross_entropy(model(pixel_values=pixels_CHW[None]).logits, label[None])
