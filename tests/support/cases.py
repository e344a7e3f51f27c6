"""Models with data and an oracle, for laws to be told of; and the settings that all tests share.

What: a `Case` is a tiny checkpoint, samples for it, and what plain autograd makes of them. A law is
a test over cases: over all of them, or over one for each mechanism of the package.
Why: a law that holds for language models holds for mixtures of experts and for images, and one
text says so.
Source: the models are those of `tests.support.models` and `tests.support.vision`, the oracle is
`tests.support.reference`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from gradpipe import CollectConfig, DataConfig, GradientStore, PruneConfig, collect, open_store
from gradpipe.store.statistics import STATISTICS
from tests.support.models import FAMILIES, VOCAB_SIZE, random_ids, save_tiny, tiny_model
from tests.support.reference import EXPERT_NAMES, layer_statistics, reference_statistics
from tests.support.texts import write_text
from tests.support.vision import FAMILIES as IMAGE_FAMILIES
from tests.support.vision import save_classifier, tiny_classifier, write_images

EVERY = tuple(STATISTICS)
MOMENTS = ("hessian", "grad_cov")  # stored as packed triangles

NUM_SAMPLES, SEQ_LEN = 5, 24
TOKENS = random_ids(VOCAB_SIZE, NUM_SAMPLES, SEQ_LEN, seed=1)
SHARD_SIZE = "20KB"  # several safetensors files

Sums = Mapping[str, Mapping[str, Tensor]]  # layer -> statistic -> float64


def collecting(root: Path, store: Path | None = None, **changes: Any) -> CollectConfig:
    """A small collection from `root`'s model and text into `root/store`: exact, resident."""
    settings: dict[str, Any] = {
        "model": str(root / "model"),
        "store": store or root / "store",
        "data": DataConfig(name=str(root / "text.txt")),
        "num_samples": 4,
        "seq_len": 16,
        "encoding": "float32",
        "schedule": "resident",
    }
    return CollectConfig(**{**settings, **changes})


def pruning(root: Path, out: Path, **changes: Any) -> PruneConfig:
    """Prune `root`'s model by `root/store`."""
    settings = {"model": str(root / "model"), "store": str(root / "store"), "out": out}
    return PruneConfig(**{**settings, **changes})


def written(root: Path, family: str = "llama", **changes: Any) -> Path:
    """A tiny model and a text in `root`, for the two above; returns `root`."""
    save_tiny(family, root / "model", **changes)
    write_text(root / "text.txt")
    return root


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, samples for it, and the oracle."""

    family: str
    distinct_inputs: tuple[int, ...] = (4, 4)  # of each block: how many tensors its layers read
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the model's config
    label: str = ""

    def __str__(self) -> str:
        """As tests are named."""
        return self.label or self.family

    @property
    def is_images(self) -> bool:
        """An image classifier, not a language model."""
        return self.family in IMAGE_FAMILIES

    @property
    def data(self) -> str:
        """What its samples are called, beside the model."""
        return "images" if self.is_images else "ids.npy"

    def model(self) -> PreTrainedModel:
        """The model, in memory."""
        make = tiny_classifier if self.is_images else tiny_model
        return make(self.family, **self.changes)

    def make(self, root: Path) -> Path:
        """Write the checkpoint and its samples; returns `root`."""
        save = save_classifier if self.is_images else save_tiny
        save(self.family, root / "model", max_shard_size=SHARD_SIZE, **self.changes)
        if self.is_images:
            write_images(root / "images")
        else:
            np.save(root / "ids.npy", TOKENS.numpy())
        return root

    def collecting(self, root: Path, store: Path | None = None, **changes: Any) -> CollectConfig:
        """A collection of this case's samples."""
        settings: dict[str, Any] = {
            "data": DataConfig(name=str(root / self.data)),
            "num_samples": NUM_SAMPLES,
            "seq_len": None if self.is_images else SEQ_LEN,
            "batch_size": 2,
        }
        return collecting(root, store, **{**settings, **changes})

    def oracle(self, root: Path, store: GradientStore) -> Sums:
        """Sums over the store's own samples by plain autograd, by the names in the checkpoint."""
        arrays = store.calibration().arrays
        if self.is_images:
            return _image_sums(self, root, store)
        return reference_statistics(self.model(), torch.from_numpy(arrays["input_ids"]).long())


def _image_sums(case: Case, root: Path, store: GradientStore) -> Sums:
    arrays, model = store.calibration().arrays, case.model()
    shape = store.spec.samples.image_shape
    assert shape is not None
    pixels = torch.from_numpy(arrays["pixel_values"]).reshape(-1, *shape)
    labels = torch.from_numpy(arrays["labels"])

    def loss_of(index: Tensor) -> Tensor:
        logits = model(pixel_values=pixels[index]).logits
        return nn.functional.cross_entropy(logits, labels[index])

    saved = tensors_of(root / "model")
    layers = {
        next(key for key, x in saved.items() if torch.equal(x, module.weight)): module
        for name, module in model.named_modules()
        if name.startswith(f"{case.family}.layers.") and isinstance(module, nn.Linear)
    }
    samples = [torch.tensor([index]) for index in range(len(labels))]
    sums = layer_statistics(layers, loss_of, samples)
    return {key.removesuffix(".weight"): x for key, x in sums.items()}


def tensors_of(folder: Path, files: str = "*.safetensors") -> dict[str, Tensor]:
    """Every tensor of a checkpoint, or of some of its files."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob(files)):
        tensors |= load_file(file)
    return tensors


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---- the cases ----

_EXPERTS = 2 + 2 * 4  # qkv, o; gate and up, and down, of each

TEXTS = tuple(
    Case(family=name, distinct_inputs=(_EXPERTS,) * 2 if name in EXPERT_NAMES else (4, 4))
    for name in FAMILIES
)
UNEVEN = Case(  # a dense block before two of experts
    family="qwen3_moe",
    changes={"mlp_only_layers": [0], "num_hidden_layers": 3},
    distinct_inputs=(4, _EXPERTS, _EXPERTS),
    label="uneven",
)
IMAGES = tuple(Case(family=name) for name in IMAGE_FAMILIES)
CASES = (*TEXTS, UNEVEN, *IMAGES)

_BY_NAME = {str(case): case for case in CASES}
LLAMA, GPT2, MIXTRAL, VIT = (_BY_NAME[name] for name in ("llama", "gpt2", "mixtral", "vit"))
EXPERTS = tuple(case for case in CASES if case.family in EXPERT_NAMES)

# One of each: nn.Linear, Conv1D, all samples' tokens in one row, blocks that give a tuple, experts,
# images.
MECHANISMS = (LLAMA, GPT2, _BY_NAME["opt"], _BY_NAME["bloom"], MIXTRAL, VIT)


class Shelf:
    """Each case's model, samples, oracle and exact store of every statistic, made once."""

    def __init__(self, folder: Path) -> None:
        """Nothing is made before it is asked for."""
        self._folder = folder
        self._oracles: dict[str, Sums] = {}

    def root(self, case: Case) -> Path:
        """The folder with `model`, the samples and `store`."""
        root = self._folder / str(case)
        if not root.exists():
            case.make(root)
            collect(case.collecting(root, statistics=EVERY))
        return root

    def store(self, case: Case) -> GradientStore:
        """Resident, in batches of 2."""
        return open_store(self.root(case) / "store")

    def oracle(self, case: Case) -> Sums:
        """What plain autograd gives for it."""
        if str(case) not in self._oracles:
            self._oracles[str(case)] = case.oracle(self.root(case), self.store(case))
        return self._oracles[str(case)]
