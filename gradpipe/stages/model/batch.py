"""A batch: what the model is called with, whatever the task.

The schedules move, split and run batches, and know nothing of what is in them. The loss of a batch
is the mean of its samples' losses: `batch.forward(model).loss`.
"""

import inspect
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gradpipe.store.folder import Calibration
from gradpipe.store.schema import SampleSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Samples, and their labels where a loss is wanted."""

    inputs: dict[str, Tensor]  # argument of the model -> (samples, …); with `labels` for a loss
    use_cache: bool | None = None  # as given to the model; None: it takes no such argument

    @classmethod
    def of_tokens(cls, ids_BT: Tensor) -> Self:
        """Windows of tokens, each the label of those before it."""
        return cls(inputs={"input_ids": ids_BT, "labels": ids_BT}, use_cache=False)

    @classmethod
    def of_images(cls, pixels_BCHW: Tensor, labels_B: Tensor) -> Self:
        """Images, each of one class."""
        return cls(inputs={"pixel_values": pixels_BCHW, "labels": labels_B})

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def __getitem__(self, part: slice) -> Self:
        return replace(self, inputs={name: x[part] for name, x in self.inputs.items()})

    def split(self, size: int) -> list[Self]:
        """Batches of `size` samples, the last one of what is left."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return replace(self, inputs={name: x.to(device) for name, x in self.inputs.items()})

    def forward(self, model: Any) -> Any:
        """What the model makes of the batch, with a loss if there are labels.

        A class that takes none, as distilled DeiT's with its two heads, is given the cross-entropy
        of the logits that it gives when it classifies.
        """
        options = {} if self.use_cache is None else {"use_cache": self.use_cache}
        inputs = {
            n: x.to(model.dtype) if x.is_floating_point() else x for n, x in self.inputs.items()
        }
        takes_labels = "labels" in inspect.signature(model.forward).parameters
        labels_B = None if takes_labels else inputs.pop("labels", None)
        output = model(**inputs, **options)
        if labels_B is not None:
            output.loss = cross_entropy(output.logits, labels_B)
        return output


def calibration_batch(calibration: Calibration, spec: SampleSpec, share: range) -> Batch:
    """The store's samples with these ids, as one batch on the CPU."""
    arrays = {
        name: torch.from_numpy(array[share.start : share.stop])
        for name, array in calibration.arrays.items()
    }
    if spec.image_shape is None:
        return Batch.of_tokens(arrays["input_ids"].long())
    pixels_BCHW = arrays["pixel_values"].reshape(-1, *spec.image_shape)
    return Batch.of_images(pixels_BCHW, arrays["labels"])
