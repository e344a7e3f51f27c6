"""`gradpipe.masks`: a pruned model is trained, and its zeros stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from gradpipe import (
    CollectConfig,
    DataConfig,
    EvalConfig,
    InputError,
    PruneConfig,
    apply_masks,
    collect,
    evaluate,
    export_masks,
    open_store,
    prune,
    verify,
)
from gradpipe.masks import HoldZeros, find_masks, hold_zeros, read_masks
from tests.support.models import tiny_model

SEQ_LEN = 128


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model pruned at 70 %, and the tokens that its store was collected on."""
    root = tmp_path_factory.mktemp("tuning")
    data = DataConfig(name="stdlib")
    collect(
        CollectConfig(
            model="embedded",
            store=root / "store",
            data=data,
            num_samples=96,
            seq_len=SEQ_LEN,
            statistics=("act_l2",),
        )
    )
    prune(
        PruneConfig(
            model="embedded",
            store=str(root / "store"),
            out=root / "out",
            method="wanda",
            sparsities=(0.7,),
        )
    )
    return root


def windows(root: Path) -> torch.Tensor:
    """The calibration's tokens, (samples, tokens)."""
    ids: Any = open_store(str(root / "store")).calibration().arrays["input_ids"]
    return torch.from_numpy(np.asarray(ids)).long()


def perplexity(model: Path) -> float:
    """On text that neither the store nor the training saw."""
    config = EvalConfig(
        model=str(model), data=DataConfig(name="stdlib"), seq_len=SEQ_LEN, max_windows=12
    )
    return evaluate(config).perplexity


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    """Where the matrices are zero."""
    return {name: x.detach() == 0 for name, x in model.named_parameters() if x.ndim == 2}


def test_a_fine_tuned_model_gains_and_keeps_every_zero(made: Path, tmp_path: Path) -> None:
    """By transformers' Trainer with the callback: a better perplexity, the same zeros."""
    model = AutoModelForCausalLM.from_pretrained(made / "out")
    before = zeros(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=24,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    data: Any = [{"input_ids": x, "labels": x} for x in windows(made)]
    Trainer(model, arguments, train_dataset=data, callbacks=[HoldZeros()]).train()
    for name, was in before.items():
        assert torch.equal(zeros(model)[name] | was, zeros(model)[name]), name
    model.save_pretrained(tmp_path / "tuned")
    for path in (made / "out").glob("tokenizer*"):
        (tmp_path / "tuned" / path.name).write_bytes(path.read_bytes())
    assert perplexity(tmp_path / "tuned") < 0.9 * perplexity(made / "out")

    export_masks(str(made / "out"), tmp_path / "masks.safetensors")
    apply_masks(str(tmp_path / "tuned"), tmp_path / "masks.safetensors", tmp_path / "new")
    verify(str(tmp_path / "new"), str(tmp_path / "tuned"))
    bytes_of = [(tmp_path / x / "model.safetensors").read_bytes() for x in ("tuned", "new")]
    assert bytes_of[0] == bytes_of[1]  # no zero was lost: there was nothing to take back


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_the_plain_function_takes_back_what_a_step_did(optimizer: Any) -> None:
    """After any optimizer's step: without it the zeros go, with it all stay, as +0.0."""
    model: Any = tiny_model("llama")
    weight: Any = model.get_submodule("model.layers.0.mlp.up_proj").weight
    with torch.no_grad():
        weight[:, ::2] = 0
    masks = find_masks(model)
    assert [*masks] == ["model.layers.0.mlp.up_proj.weight"]
    steps = optimizer(model.parameters(), lr=0.1)
    ids = torch.arange(3, 19)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    steps.step()
    assert int((weight == 0).sum()) == 0
    hold_zeros(model, masks)
    assert torch.equal(weight[:, ::2].detach().view(torch.int32), torch.zeros(56, 16).int())
    assert int((weight[:, 1::2] == 0).sum()) == 0


def test_new_matrices_of_zeros_are_left_to_learn() -> None:
    """An adapter starts at zero: that is no pruning."""
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[0, 0] = 0
        model[1].weight.zero_()
        model[1].bias.zero_()
    assert [*find_masks(model)] == ["0.weight"]


def test_masks_of_a_file_hold_as_those_of_the_model(made: Path, tmp_path: Path) -> None:
    """The exported masks are of the tensors' names, which are the parameters'."""
    export_masks(str(made / "out"), tmp_path / "masks.safetensors")
    model = AutoModelForCausalLM.from_pretrained(made / "out")
    masks = read_masks(tmp_path / "masks.safetensors")
    found = find_masks(model)
    assert masks.keys() <= found.keys()
    for name, mask in masks.items():
        assert torch.equal(mask, found[name])
    dense = AutoModelForCausalLM.from_pretrained(made / "out")
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(1)
    HoldZeros(masks).on_train_begin(None, None, None, model=dense)
    for name, mask in masks.items():
        assert torch.equal(dense.get_parameter(name) != 0, mask)


def test_masks_of_another_model_are_refused(made: Path) -> None:
    """By the name, or the shape, of the first that fits nothing."""
    masks = find_masks(AutoModelForCausalLM.from_pretrained(made / "out"))
    with pytest.raises(InputError, match="the model's parameter is"):
        hold_zeros(tiny_model("llama"), masks)
    with pytest.raises(InputError, match="the model's parameter is none"):
        hold_zeros(nn.Linear(2, 2), masks)
