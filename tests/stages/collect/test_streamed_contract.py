"""Blocks that are called, or answer, otherwise than Llama's: the same numbers, streamed."""

import io
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from rich.console import Console
from torch import Tensor, nn
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from gradpipe import CollectConfig, DataConfig, GradpipeError, collect
from gradpipe.stages.collect.block_calls import BlockCalls
from gradpipe.stages.collect.hooks import LayerHooks
from gradpipe.stages.collect.sums import LayerAccumulator
from gradpipe.stages.model.batch import Batch
from gradpipe.stages.model.blocks import Blocks
from tests.models.configs import TEXT
from tests.support.architectures import filled
from tests.support.autograd import gradient_sums, of_layer
from tests.support.cases import collecting
from tests.support.models import tiny_tokenizer
from tests.support.stores import toy_layer
from tests.support.texts import write_text
from tests.support.vision import write_images
from tests.support.workplace import edit_weights

_GEMMA: dict[str, Any] = {
    **TEXT,
    "head_dim": 16,
    "global_head_dim": 16,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 320,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_OPT: dict[str, Any] = {
    **TEXT,
    "ffn_dim": 56,
    "word_embed_proj_dim": 16,
    "do_layer_norm_before": False,
    "dropout": 0.0,
}
_GPT: dict[str, Any] = {
    "vocab_size": 320,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
}

# what is special -> model type, its config, layers outside the blocks that are collected too
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "keys and values of earlier blocks": ("gemma4_text", _GEMMA, ()),
    "a layer that feeds every block": ("gemma4_text", _GEMMA, ("per_layer_model_projection",)),
    "a layer before the blocks": ("opt", _OPT, ("project_in",)),
    "layers before and after the blocks": ("opt", _OPT, ("project_in", "project_out")),
    "a list as an answer": ("openai-gpt", _GPT, ()),
}


def streaming(root: Path, **options: Any) -> CollectConfig:
    """A small run in `root`."""
    settings: dict[str, Any] = {"num_samples": 3, "schedule": "streamed"}
    settings["statistics"] = ("grad_l1", "grad_sum", "act_l2")
    return collecting(root, root / "streamed", **{**settings, **options})


def write(root: Path, kind: str, options: dict[str, Any]) -> Any:
    """A model that nothing is degenerate in, its tokenizer and a text; returns the model."""
    made = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(kind, **options))
    model = filled(made, 0.2)
    model.save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    write_text(root / "text.txt")
    return model


@pytest.mark.parametrize("case", CASES)
def test_a_language_model_is_streamed_to_the_bit_and_right(case: str, tmp_path: Path) -> None:
    """In micro-batches of one size, of two, and all at once; and it is what autograd says."""
    kind, options, include = CASES[case]
    model = write(tmp_path, kind, options)
    streamed = streaming(tmp_path, include=include)
    for batch_size in (1, 2, 4):
        store = collect(replace(streamed, batch_size=batch_size, overwrite=True))
        resident = replace(streamed, schedule="resident", store=tmp_path / "resident")
        assert (
            store.digest == collect(replace(resident, batch_size=batch_size, overwrite=True)).digest
        )
    assert {layer.block is None for layer in store.spec.layers} == {False, bool(include)}
    expected = gradient_sums(model, store.calibration().arrays)
    for layer in store.spec.layers:
        wanted, got = of_layer(expected, layer), store.read_norms(layer, "grad_l1")
        assert wanted.any()
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4 * np.sqrt((wanted**2).mean()))


# three stages each, the last of 4 x 4 patches
VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": (
        "SwinForImageClassification",
        {"patch_size": 2, "depths": [1, 1, 1], "num_heads": [2, 4, 4], "window_size": 4},
    ),
    "focalnet": (
        "FocalNetForImageClassification",
        {
            "patch_size": 2,
            "depths": [1, 1, 1],
            "focal_levels": [1, 1, 1],
            "focal_windows": [3, 3, 3],
        },
    ),
}


@pytest.mark.parametrize("family", VISION)
def test_stages_of_other_widths_are_streamed(family: str, tmp_path: Path) -> None:
    """What blocks hand on has another shape, and more parts, from stage to stage."""
    name, options = VISION[family]
    made = hf.AutoConfig.for_model(
        family, architectures=[name], image_size=32, embed_dim=16, num_labels=3, **options
    )
    filled(getattr(hf, name)(made), 0.2).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    write_images(tmp_path / "images", 6)
    data = DataConfig(name=str(tmp_path / "images"))
    streamed = streaming(tmp_path, data=data, seq_len=None, batch_size=2)
    resident = replace(streamed, schedule="resident", store=tmp_path / "resident")
    store = collect(streamed)
    assert store.digest == collect(resident).digest
    assert {layer.block for layer in store.spec.layers} == {0, 1, 2}


class _Block(nn.Module):
    def __init__(self, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.answer = answer

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.answer(self.linear(hidden), hidden, *args, **kwargs)


class _Model(nn.Module):
    """Two blocks; `between` says how the second is called."""

    def __init__(
        self,
        between: Callable[[list[Any], Tensor, Tensor], Any],
        answer: Callable[..., Any] = lambda new, *_: new,
    ) -> None:
        super().__init__()
        self.dtype = torch.float32
        self.embed = nn.Embedding(8, 4)
        self.blocks = [_Block(answer), _Block(answer)]
        self.layers = nn.ModuleList(self.blocks)
        self.between = between

    def forward(self, input_ids: Tensor, labels: Any = None, **_: Any) -> Any:
        del labels  # the loss is the toy's own
        hidden = self.layers[0](self.embed(input_ids))
        return self.between(list(self.layers), hidden, input_ids)


def calls_of(model: nn.Module) -> BlockCalls:
    """Nothing known yet."""
    blocks = Blocks(path="layers", paths=("layers.0", "layers.1"))
    return BlockCalls(model, blocks, lambda _: nullcontext(), torch.device("cpu"))


def batch(*ids: int) -> Batch:
    """One sample."""
    return Batch.of_tokens(torch.tensor([ids]))


@pytest.mark.parametrize(
    ("between", "says"),
    [
        (lambda blocks, hidden, _: blocks[1](hidden * 2), "layers.1 is not called with what"),
        (lambda blocks, hidden, _: blocks[1](hidden, hidden.sum()), "computes from an earlier"),
        (lambda blocks, hidden, _: blocks[1](hidden, hidden.detach() > 0.5), "computes from an"),
        (lambda blocks, hidden, ids: blocks[1](hidden, int(ids[0, 0])), "is no tensor"),
        (lambda blocks, hidden, _: blocks[1](hidden[:, 1:]), "layers.1 is not called with what"),
        (lambda blocks, hidden, _: blocks[0](hidden), r"layers.0 runs out of turn"),
        (lambda _, hidden, __: SimpleNamespace(loss=hidden, logits=hidden), "layers.1 never runs"),
    ],
)
def test_what_cannot_be_called_again_is_refused(between: Any, says: str) -> None:
    """One line that names the block, whether the samples differ or not."""
    calls = calls_of(_Model(between))
    with pytest.raises(GradpipeError, match=says):
        _ = [calls.record(batch(*ids)) for ids in ((1, 2), (3, 4))]


def test_a_block_that_changes_its_arguments_is_refused() -> None:
    """They may be those of other blocks, and of other micro-batches."""

    def changes(new: Tensor, _: Tensor, mask: Tensor | None = None) -> Tensor:
        return new if mask is None else new + mask.add_(1)

    model = _Model(lambda blocks, hidden, _: blocks[1](hidden, torch.zeros(1)), changes)
    with pytest.raises(GradpipeError, match="change a tensor that they are called with"):
        calls_of(model).record(batch(1, 2))


def test_arguments_that_depend_on_the_samples_are_told_apart() -> None:
    """The first micro-batch's are kept as they are; of others, what differs."""
    model = _Model(lambda blocks, hidden, ids: blocks[1](hidden, ids, torch.ones(2)))
    calls = calls_of(model)
    assert calls.record(batch(1, 2)) == {}
    assert calls.record(batch(1, 2)) == {}
    different = calls.record(batch(3, 4))
    assert sorted(different) == ["0:0", "1:1"]
    assert different["1:1"].tolist() == [[3, 4]]
    assert (calls.carried(1), calls.carried(2)) == (("0.0",), ("1.0",))
    hidden = torch.randn(1, 2, 4)
    found = calls.run(1, 1, {"0.0": hidden, **different})
    assert torch.equal(found["1.0"], model.blocks[1].linear(hidden))


def test_a_block_that_answers_otherwise_than_the_one_like_it_is_named() -> None:
    """Blocks that look alike are asked once; one that has its own way is noticed when it runs."""
    model = _Model(lambda blocks, hidden, _: blocks[1](hidden))
    calls = calls_of(model)
    calls.record(batch(1, 2))
    model.blocks[1].answer = lambda new, *_: (new, new)
    with pytest.raises(GradpipeError, match=r"block layers\.1 answers otherwise"):
        calls.run(1, 1, {"0.0": torch.zeros(1, 2, 4)})


class _Skipping(_Model):
    def __init__(self) -> None:
        super().__init__(lambda blocks, hidden, _: (hidden, blocks[1](hidden)))


def test_a_head_that_reads_an_earlier_block_is_known() -> None:
    """What it would read is a placeholder, which a gradient then reaches."""
    calls = calls_of(model := _Skipping())
    calls.record(batch(1, 2))
    leaf = torch.randn(1, 2, 4, requires_grad=True)
    with calls.answered(1, {"1.0": leaf}) as others:
        skipped, last = model(torch.tensor([[1, 2]]))
    assert last is leaf
    (gradient,) = torch.autograd.grad((skipped * 2 + last).sum(), others)
    assert gradient.eq(2).all()


@pytest.mark.parametrize("schedule", ["resident", "streamed"])
def test_gradients_that_are_all_zero_are_said_aloud(schedule: str, tmp_path: Path) -> None:
    """A gate that is shut passes nothing back: true zeros are kept, and named."""
    write(tmp_path, "llama", TEXT)
    edit_weights(tmp_path / "model", lambda x: x["model.layers.1.mlp.down_proj.weight"].zero_())
    console = Console(file=io.StringIO(), width=200)
    store = collect(streaming(tmp_path, schedule=schedule), console)
    assert isinstance(console.file, io.StringIO)
    said = "gradients of 2 layers are all zero, as model.layers.1.mlp.gate_proj's are"
    assert said in console.file.getvalue()
    layer = store.spec.layer("model.layers.1.mlp.up_proj")
    assert layer is not None
    assert not store.read_norms(layer, "grad_l1").any()


def test_a_layer_that_the_loss_does_not_depend_on_is_refused() -> None:
    """Zeros would read as 'prune this first'."""
    model = _Model(lambda blocks, hidden, _: (hidden, blocks[1](hidden).detach()))
    model.requires_grad_(requires_grad=False)
    layers = [toy_layer(f"layers.{block}.linear", (4, 4), block=block) for block in (0, 1)]
    cpu = torch.device("cpu")
    sums = {x.name: LayerAccumulator(x, ("grad_l1",), cpu) for x in layers}

    def run() -> None:
        with LayerHooks(model, sums, 1, 1.0):
            hidden, unused = model(torch.tensor([[1, 2]]))
            (hidden + unused).sum().backward()

    with pytest.raises(GradpipeError, match=r"layers\.1\.linear gets no gradient"):
        run()
    assert sums["layers.0.linear"].result().arrays["grad_l1"].any()
