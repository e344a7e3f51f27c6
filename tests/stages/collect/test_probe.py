"""What the short pass before a collection refuses: models that do not guess the next token."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gradpipe.errors import InputError
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.collect.probe import probe
from gradpipe.stages.model.load import load_model
from gradpipe.stages.model.own_loss import check_next_token
from gradpipe.stages.model.skeleton import take_apart
from gradpipe.stages.model.tasks import find_task
from tests.support.architectures import save_architecture

CPU = torch.device("cpu")


def probed(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Probe the model in `folder` as a collection does, and whole, as an evaluation does."""
    checkpoint = Checkpoint.open(str(folder))
    skeleton = take_apart(checkpoint, dtype)
    before = [type(x) for x in skeleton.model.modules()]
    try:
        probe(skeleton, CPU)
    finally:
        assert [type(x) for x in skeleton.model.modules()] == before
        assert all(x.is_meta for x in skeleton.model.parameters())
    check_next_token(load_model(checkpoint, dtype, CPU), checkpoint.name, CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("model_type", ["llama", "jamba", "gemma3", "qwen2_moe"])
def test_causal_language_models_pass(model_type: str, dtype: str, tmp_path: Path) -> None:
    """In any type, of several classes of block, with experts, within an image-text model."""
    if model_type == "jamba" and dtype == "float16":
        pytest.skip("its state space is bfloat16's at least")
    probed(save_architecture(model_type, tmp_path / "model"), getattr(torch, dtype))


REFUSED = {
    "bert": r"BertLMHeadModel sees the token that it should guess",
    "roberta": r"RobertaForCausalLM sees the token that it should guess",
    "bart": r"the loss of BartForCausalLM is \d.*the next token's cross-entropy is",
    "codegen": r"CodeGenForCausalLM cannot run on 8 tokens: RuntimeError: ",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_other_models_are_refused_in_one_line(model_type: str, tmp_path: Path) -> None:
    """Encoders, losses of something else, and configs that its own code cannot run."""
    changes: dict[str, Any] = {"rotary_dim": 64} if model_type == "codegen" else {}
    if model_type.endswith("bert") or model_type == "roberta":
        changes["is_decoder"] = False
    folder = save_architecture(model_type, tmp_path / "model", **changes)
    with pytest.raises(InputError, match=REFUSED[model_type]) as refusal:
        probed(folder)
    assert len(str(refusal.value).splitlines()) == 1


KINDS = {
    "BertForMaskedLM": ("bert", "a masked language model"),
    "Qwen2ForSequenceClassification": ("qwen2", "a classifier or reward model"),
    "BartForConditionalGeneration": ("bart", "an encoder-decoder"),
    "WhisperForConditionalGeneration": ("whisper", "an encoder-decoder"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_architectures_for_something_else_are_named(kind: str, tmp_path: Path) -> None:
    """Before anything is loaded."""
    model_type, noun = KINDS[kind]
    folder = tmp_path / "model"
    folder.mkdir()
    text = f'{{"architectures": ["{kind}"], "model_type": "{model_type}"}}'
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=rf"is a {kind}, {noun}: expected a causal"):
        find_task(Checkpoint.outline(str(folder)))
