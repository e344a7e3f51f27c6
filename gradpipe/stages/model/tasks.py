"""Tasks: what a checkpoint is for, by its architecture, and which class loads it."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from gradpipe.errors import InputError
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.store.schema import CAUSAL_LM, IMAGE_CLASSIFICATION

_AUTO_CLASSES: dict[str, Any] = {
    CAUSAL_LM: AutoModelForCausalLM,
    IMAGE_CLASSIFICATION: AutoModelForImageClassification,
}

_NOUNS = {CAUSAL_LM: "a causal language model", IMAGE_CLASSIFICATION: "an image classifier"}


def find_task(checkpoint: Checkpoint, asked: str | None = None) -> str:
    """The task that the architecture is for; InputError if another one is asked for."""
    found = CAUSAL_LM
    if checkpoint.architecture in _image_architectures():
        found = IMAGE_CLASSIFICATION
    if asked not in {None, found}:
        raise InputError(
            f"--task {asked}: {checkpoint.name} is a {checkpoint.architecture}, "
            f"not {_NOUNS[str(asked)]}: give another model, or leave out --task"
        )
    return found


def check_loss_of_labels(model: Any) -> None:
    """Raises InputError for an image classifier whose loss is not the cross-entropy of labels."""
    name, kind = type(model).__name__, getattr(model.config, "problem_type", None)
    if "labels" not in inspect.signature(model.forward).parameters:
        raise InputError(f"{name} takes no labels: it has no loss to differentiate")
    if model.config.num_labels < 2 or kind not in {None, "single_label_classification"}:
        raise InputError(
            f"{name} with {model.config.num_labels} labels, problem_type {kind}: expected a model "
            "that tells classes apart, one for each image"
        )


def auto_class(checkpoint: Checkpoint) -> Any:
    """The class of transformers that loads the checkpoint."""
    return _AUTO_CLASSES[find_task(checkpoint)]


def noun(checkpoint: Checkpoint) -> str:
    """What the checkpoint is loaded as, in words."""
    return _NOUNS[find_task(checkpoint)]


def _image_architectures() -> set[str]:
    names = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
    return {name for entry in names for name in ((entry,) if isinstance(entry, str) else entry)}
