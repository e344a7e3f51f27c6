"""What gradpipe makes of one model type: the whole way on a toy, and a verdict in one line.

`collected`: streamed is resident to the bit; both are what ordinary autograd gives of one sample at
a time; the model is pruned to 50 % and 2:4, evaluated, and opened by `from_pretrained` with nothing
missing or unexpected. `refused: LINE`: what the user reads. Anything else is a fault, or a toy that
cannot be built here.
"""

from __future__ import annotations

import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification
from transformers.models.auto import modeling_auto
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import logging as hf_logging

from gradpipe import DataConfig, EvalConfig, GradientStore
from gradpipe.errors import GradpipeError
from gradpipe.pipeline.collect.run import collect
from gradpipe.pipeline.compare import compare
from gradpipe.pipeline.prune.run import prune
from tests.models.configs import tiny_config
from tests.models.image_configs import SIZE, tiny_image_config
from tests.support.architectures import filled
from tests.support.autograd import gradient_sums, of_layer
from tests.support.cases import collecting, pruning
from tests.support.vision import write_images

COLLECTED = "collected"
TOLERANCE = 1e-3  # of a layer's sums, in units of their root mean square
_STATISTICS = ("grad_l1", "act_l2")
_SEQ_LEN = 24
_NUM_SAMPLES = 3
_MOST_WEIGHTS = 8_000_000
_NUMBERS = re.compile(r"\d+\.\d{3,}(e[-+]\d+)?")  # of losses: they move with the processor

_OTHERS = {  # a type, and what is loaded as another thing than its own: all must be refused
    "other/t5": ("t5", "AutoModelForSeq2SeqLM"),
    "other/bart": ("bart", "AutoModelForSeq2SeqLM"),
    "other/bert": ("bert", "AutoModelForMaskedLM"),
    "other/deberta-v2": ("deberta-v2", "AutoModelForMaskedLM"),
    "other/llama": ("llama", "AutoModelForSequenceClassification"),
    "other/qwen3": ("qwen3", "AutoModelForTokenClassification"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Toy:
    """A kind of task: how its toys are built and measured, and what data they take."""

    config: Any
    auto_class: Any
    data: str
    seq_len: int | None


def names() -> list[str]:
    """Every case: `causal-lm/llama`, `images/vit`, `other/t5`."""
    texts = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    images = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    return [*(f"causal-lm/{x}" for x in texts), *(f"images/{x}" for x in images), *_OTHERS]


def write_data(folder: Path) -> Path:
    """The calibration and held-out data of all cases: tokens, and images of classes."""
    tokens = np.random.default_rng(0).integers(8, 320, (8, _SEQ_LEN))
    np.save(folder / "tokens.npy", tokens)
    write_images(folder / "images", count=2)
    return folder


def verdict(name: str, data: Path, folder: Path) -> str:
    """The verdict on one case, worked out in `folder`, which is emptied before and after."""
    warnings.filterwarnings("ignore")
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        line = _verdict(name, data, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _NUMBERS.sub("#", line.replace(f"{folder}/", ""))


def _verdict(name: str, data: Path, folder: Path) -> str:
    kind, _, model_type = name.partition("/")
    toy = _Toy(
        config=tiny_image_config if kind == "images" else tiny_config,
        auto_class=AutoModelForImageClassification if kind == "images" else AutoModelForCausalLM,
        data=str(data / ("images" if kind == "images" else "tokens.npy")),
        seq_len=None if kind == "images" else _SEQ_LEN,
    )
    try:
        _build(name, model_type, toy, folder / "model")
    except Exception as error:  # noqa: BLE001 (each model's code raises what it likes)
        return f"not built: {type(error).__name__}: {_first_line(error)}"
    stores: dict[str, GradientStore | str] = {}
    for schedule in ("resident", "streamed"):
        try:
            stores[schedule] = _collect(toy, folder, schedule)
        except GradpipeError as error:
            stores[schedule] = f"refused: {error}"
        except Exception as error:  # noqa: BLE001
            stores[schedule] = f"wrong: traceback: {type(error).__name__}: {_first_line(error)}"
    resident, streamed = stores["resident"], stores["streamed"]
    if isinstance(resident, str) or isinstance(streamed, str):
        if resident == streamed:
            return str(resident)
        return "; ".join(f"{k} {v if isinstance(v, str) else COLLECTED}" for k, v in stores.items())
    return _difference(resident, streamed) or _whole_way(toy, folder, resident)


def _whole_way(toy: _Toy, folder: Path, store: GradientStore) -> str:
    """From the store on: autograd, pruning, `from_pretrained`, evaluation."""
    try:
        return _wrong_sums(toy, folder, store) or _wrong_outputs(toy, folder) or COLLECTED
    except Exception as error:  # noqa: BLE001
        return f"wrong: {type(error).__name__}: {_first_line(error)}"


def _build(name: str, model_type: str, toy: _Toy, folder: Path) -> None:
    """Write a toy of the type, with weights large enough that nothing is degenerate."""
    if name in _OTHERS:
        toy_class: Any = getattr(__import__("transformers"), _OTHERS[name][1])
    else:
        toy_class = toy.auto_class
    config = toy.config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in toy_class.from_config(config).parameters())
    if size > _MOST_WEIGHTS:
        raise ValueError(f"{size} weights: its config has other names for its sizes")
    torch.manual_seed(0)
    model = toy_class.from_config(config, dtype=torch.float32)
    filled(model, 0.25).save_pretrained(folder)
    if toy.seq_len is None:
        ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)


def _collect(toy: _Toy, folder: Path, schedule: str) -> GradientStore:
    return collect(
        collecting(
            folder,
            folder / schedule,
            data=DataConfig(name=toy.data),
            seq_len=toy.seq_len,
            num_samples=_NUM_SAMPLES,
            batch_size=2,
            statistics=_STATISTICS,
            schedule=schedule,
        )
    )


def _difference(resident: GradientStore, streamed: GradientStore) -> str | None:
    """Where the schedules differ; None: nowhere."""
    if resident.spec.layers != streamed.spec.layers:
        return "wrong: the schedules have other layers"
    for layer in resident.spec.layers:
        for name in layer.own(_STATISTICS):
            one, other = (x.read_norms(layer, name) for x in (resident, streamed))
            if not np.array_equal(np.asarray(one), np.asarray(other)):
                return f"wrong: streamed differs from resident in {name} of {layer.name}"
    return None


def _wrong_sums(toy: _Toy, folder: Path, store: GradientStore) -> str | None:
    """The layer whose sums are not autograd's; None: there is none."""
    model = toy.auto_class.from_pretrained(folder / "model", dtype=torch.float32)
    samples = dict(store.calibration().arrays)
    if "pixel_values" in samples:
        samples["pixel_values"] = samples["pixel_values"].reshape(_NUM_SAMPLES, 3, SIZE, SIZE)
    expected = gradient_sums(model, samples)
    for layer in store.spec.layers:
        want, got = of_layer(expected, layer), np.asarray(store.read_norms(layer, "grad_l1"))
        scale = float(np.sqrt((want**2).mean()))
        if float(np.abs(got - want).max()) > TOLERANCE * scale:
            return f"wrong: the gradients of {layer.name} are not autograd's"
    return None


def _wrong_outputs(toy: _Toy, folder: Path) -> str | None:
    """What is wrong with a pruned checkpoint; None: nothing."""
    targets = {"sparsities": (0.5,), "patterns": ("2:4",)}
    for result in prune(pruning(folder, folder / "out", store=str(folder / "resident"), **targets)):
        _, report = toy.auto_class.from_pretrained(result.folder, output_loading_info=True)
        if odd := {*report["missing_keys"], *report["unexpected_keys"]}:
            return f"wrong: from_pretrained misses or does not expect {min(odd)}"
        if not 0.4 < result.achieved < 0.6:
            return f"wrong: {result.achieved:.2f} of the pruned weights are zero"
        evaluation = EvalConfig(
            model=str(result.folder),
            data=DataConfig(name=toy.data),
            seq_len=toy.seq_len,
            max_windows=None if toy.seq_len is None else 2,
        )
        compare([evaluation.model], evaluation)
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
