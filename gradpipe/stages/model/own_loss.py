"""Whether a model runs on its task's samples alone, and its own loss is that of the task.

Of text: an encoder sees the token that it should guess; a decoder of an encoder-decoder may want
its labels shifted by the caller; a loss may have more terms. All of them would give numbers, none
of them the gradient of the next token's loss. Of images: some models take more, as a text beside
one. A short pass or two tell, before anything is begun.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gradpipe.errors import InputError, class_and_line
from gradpipe.stages.device import is_out_of_memory
from gradpipe.stages.model.batch import Batch
from gradpipe.stages.model.trial import image_shape

_TOKENS = 8


@torch.no_grad()
def check_next_token(model: Any, name: str, device: torch.device) -> None:
    """Raises InputError unless logits are causal and the loss is their mean cross-entropy."""
    ids_T = model.get_input_embeddings().num_embeddings // 2 + torch.arange(_TOKENS + 1)
    ids_1T, other_1T = ids_T[None, :-1].to(device), ids_T[None, :-1].clone().to(device)
    other_1T[0, -1] = ids_T[-1]
    output = _run(model, name, ids_1T)
    logits_TV, other_TV = output.logits[0], _run(model, name, other_1T).logits[0]
    if logits_TV.shape[0] != _TOKENS:
        raise InputError(
            f"{name}: {type(model).__name__} gives {logits_TV.shape[0]} rows of logits for "
            f"{_TOKENS} tokens: expected one for each, as a causal language model gives"
        )
    moved = float((logits_TV[:-1] - other_TV[:-1]).abs().max())
    if moved > _tolerance(model) * float(logits_TV.abs().max()):
        raise InputError(
            f"{name} is no causal language model: {type(model).__name__} sees the token that it "
            "should guess (its last token changes earlier logits): give a decoder"
        )
    expected = float(cross_entropy(logits_TV[:-1].float(), ids_1T[0, 1:]))
    check_loss_is(float(output.loss), expected, model, name, "the next token's")


def check_loss_is(loss: float, expected: float, model: Any, name: str, whose: str) -> None:
    """Raises InputError if the model's own loss is another than the cross-entropy of its logits."""
    if abs(loss - expected) > _tolerance(model) * max(1.0, abs(expected)):
        raise InputError(
            f"{name}: the loss of {type(model).__name__} is {loss:.4f}, {whose} cross-entropy is "
            f"{expected:.4f}: it is trained on something else"
        )


def _tolerance(model: Any) -> float:
    """Between rounding, which differs where experts get other numbers of tokens, and a leak."""
    return float(torch.finfo(model.dtype).eps ** 0.5)


def _run(model: Any, name: str, ids_1T: Tensor) -> Any:
    """What the model makes of its own tokens as labels; InputError for an error of its code."""
    try:
        output = model(input_ids=ids_1T, labels=ids_1T, use_cache=False)
    except Exception as error:
        raise InputError(
            f"{name}: {type(model).__name__} cannot run on {ids_1T.shape[1]} tokens: "
            f"{class_and_line(error)}"
        ) from error
    if getattr(output, "loss", None) is None or getattr(output, "logits", None) is None:
        raise InputError(f"{name}: {type(model).__name__} gives no loss of tokens")
    return output


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
