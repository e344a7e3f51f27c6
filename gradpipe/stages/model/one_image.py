"""Whether an image classifier runs on an image alone, and its loss is that of the image's class.

Some take more than an image, as a text beside it or the size of its parts; some give a loss of
something else. One short pass tells, before anything is begun.
"""

from typing import Any

import torch

from gradpipe.errors import InputError, class_and_line
from gradpipe.stages.device import is_out_of_memory
from gradpipe.stages.model.batch import Batch
from gradpipe.stages.model.next_token import check_loss_is
from gradpipe.stages.model.trial import image_shape


@torch.no_grad()
def try_one_image(model: Any, name: str, device: torch.device) -> Any:
    """What the model makes of an image of class 0; InputError if it cannot run on it alone."""
    shape, kind = image_shape(model), type(model).__name__
    pixels_1CHW = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    batch = Batch.of_images(pixels_1CHW, torch.zeros(1, dtype=torch.long)).to(device)
    try:
        return batch.forward(model)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"{name}: {kind} cannot run on an image of {' x '.join(map(str, shape))} alone: "
            f"{class_and_line(error)}"
        ) from error


def check_one_image(model: Any, name: str, device: torch.device) -> None:
    """Raises InputError unless the model gives logits of classes, and their cross-entropy."""
    output = try_one_image(model, name, device)
    if getattr(output, "loss", None) is None or getattr(output, "logits", None) is None:
        raise InputError(f"{name}: {type(model).__name__} gives no loss of an image's class")
    expected = float(-output.logits[0].float().log_softmax(dim=-1)[0])
    check_loss_is(float(output.loss), expected, model, name, "the class's")
