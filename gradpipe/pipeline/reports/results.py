"""What runs give: frozen results, from which every report is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerResult:
    """One layer of a written checkpoint, as read back from its file."""

    name: str
    requested: float  # sparsity
    zeros: int
    size: int
    pattern: str | None = None  # n:m, where it is one

    @property
    def achieved(self) -> float:
        """The share of weights that are zero."""
        return self.zeros / self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneResult:
    """One written checkpoint."""

    folder: Path
    label: str
    requested: float  # sparsity, over all pruned layers
    layers: tuple[LayerResult, ...]

    @property
    def achieved(self) -> float:
        """Sparsity found in the written files, over all pruned layers."""
        return sum(x.zeros for x in self.layers) / sum(x.size for x in self.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """A perplexity, and what one must know to compare it."""

    perplexity: float
    model: str
    dataset: str
    dataset_config: str | None
    split: str | None  # None for a local file or folder, which has none
    revision: str | None
    num_windows: int
    seq_len: int
    num_tokens: int
    dtype: str

    @property
    def summary(self) -> str:
        """The measure and its conditions, on one line."""
        return (
            f"perplexity {self.perplexity:.4f}  ({_data_name(self)}, {self.num_windows} windows "
            f"of {self.seq_len} = {self.num_tokens} tokens, {self.dtype})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """A top-1 accuracy, and what one must know to compare it."""

    top1: float  # 0 to 1
    model: str
    dataset: str
    dataset_config: str | None
    split: str | None  # None for a local file or folder, which has none
    revision: str | None
    num_images: int
    dtype: str

    @property
    def summary(self) -> str:
        """The measure and its conditions, on one line."""
        return (
            f"top-1 {100 * self.top1:.2f} %  ({_data_name(self)}, {self.num_images} images, "
            f"{self.dtype})"
        )


def _data_name(result: Metrics | Accuracy) -> str:
    """What was measured on, as `c4 en validation`."""
    parts = (result.dataset, result.dataset_config, result.split)
    return " ".join(part for part in parts if part is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """Perplexities by row (method) and column (target), and where everything lies."""

    folder: Path
    dense: float  # perplexity of the unpruned model
    perplexities: dict[str, dict[str, float]]
