"""Tasks: what a checkpoint is for, by its architecture, and which class loads it."""

from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
)
from transformers.models.auto import modeling_auto

from gradpipe.errors import InputError
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.store.schema import CAUSAL_LM, IMAGE_CLASSIFICATION

_AUTO_CLASSES: dict[str, Any] = {
    CAUSAL_LM: AutoModelForCausalLM,
    IMAGE_CLASSIFICATION: AutoModelForImageClassification,
}

# transformers' lists of classes for something else, and what such a model is
_OTHERS = {
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "an encoder-decoder",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "an encoder-decoder",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "a masked language model",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "a classifier or reward model",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "a classifier of tokens",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "a finder of answers",
}

_GENERATES = ("causallm", "lmhead", "conditionalgeneration")  # in names that transformers lacks
_NOUNS = {CAUSAL_LM: "a causal language model", IMAGE_CLASSIFICATION: "an image classifier"}


def find_task(checkpoint: Checkpoint, asked: str | None = None) -> str:
    """The task that the architecture is for.

    Raises InputError if another one is asked for, and for an architecture that is for neither.
    """
    found = CAUSAL_LM
    if checkpoint.architecture in _classes("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"):
        found = IMAGE_CLASSIFICATION
    if asked not in {None, found}:
        raise InputError(
            f"--task {asked}: {checkpoint.name} is a {checkpoint.architecture}, "
            f"not {_NOUNS[str(asked)]}: give another model, or leave out --task"
        )
    if found == CAUSAL_LM and (kind := _other_kind(checkpoint)):
        raise InputError(
            f"{checkpoint.name} is a {checkpoint.architecture}, {kind}: expected a causal language "
            "model or an image classifier"
        )
    return found


def _other_kind(checkpoint: Checkpoint) -> str | None:
    """What an architecture is that is no causal language model; None if it may be one."""
    architecture = checkpoint.architecture
    texts = _classes("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    texts |= _classes("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")
    texts |= _classes("MODEL_MAPPING_NAMES")
    if architecture not in texts and checkpoint.config.get("is_encoder_decoder"):
        return "an encoder-decoder"
    if architecture == "unknown" or architecture in texts:
        return None
    for mapping, kind in _OTHERS.items():
        if architecture in _classes(mapping):
            return kind
    is_named_so = any(x in architecture.lower() for x in _GENERATES)
    return None if is_named_so else "which has no language model's head by its name"


def check_loss_of_labels(model: Any) -> None:
    """Raises InputError for an image classifier whose loss is not the cross-entropy of labels."""
    name, kind = type(model).__name__, getattr(model.config, "problem_type", None)
    if model.config.num_labels < 2 or kind not in {None, "single_label_classification"}:
        raise InputError(
            f"{name} with {model.config.num_labels} labels, problem_type {kind}: expected a model "
            "that tells classes apart, one for each image"
        )


def auto_class(checkpoint: Checkpoint) -> Any:
    """The class of transformers that loads the checkpoint.

    A model of images and text, whose language model is what runs on text, often has one of its own.
    """
    task, kind = find_task(checkpoint), checkpoint.config.get("model_type")
    is_of_text = kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    takes_images = kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if task == CAUSAL_LM and takes_images and not is_of_text:
        return AutoModelForImageTextToText
    return _AUTO_CLASSES[task]


def noun(checkpoint: Checkpoint) -> str:
    """What the checkpoint is loaded as, in words."""
    return _NOUNS[find_task(checkpoint)]


def _classes(mapping: str) -> set[str]:
    names = getattr(modeling_auto, mapping).values()
    return {name for entry in names for name in ((entry,) if isinstance(entry, str) else entry)}
