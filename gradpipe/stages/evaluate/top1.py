"""Top-1 accuracy: the share of images whose label has the largest logit."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gradpipe.errors import GradpipeError
from gradpipe.stages.data.images import Images, Processor
from gradpipe.stages.model.batch import Batch


@torch.no_grad()
def top1(
    model: Any,
    images: Images,
    processor: Processor,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> float:
    """Accuracy of `model` on `images`, 0 to 1; `advance` hears of images done.

    Raises GradpipeError for logits that are NaN.
    """
    correct = 0
    for start in range(0, len(images.labels), batch_size):
        ids = range(start, min(start + batch_size, len(images.labels)))
        pixels = np.stack([processor.pixels(images, i) for i in ids])
        batch = Batch(inputs={"pixel_values": torch.from_numpy(pixels)})  # not all take labels
        labels_B = torch.tensor([images.labels[i] for i in ids], device=model.device)
        logits_BC = batch.to(model.device).forward(model).logits
        if bool(logits_BC.isnan().any()):
            raise GradpipeError(
                f"the model's logits are NaN on image {start + 1} of {len(images.labels)}: try "
                "--dtype bfloat16 or float32, or mend the checkpoint"
            )
        correct += int((logits_BC.argmax(-1) == labels_B).sum())
        advance(len(ids))
    return correct / len(images.labels)
