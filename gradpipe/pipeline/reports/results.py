"""What runs give: frozen results, from which every report is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from gradpipe.store.facts import as_html
from gradpipe.store.summary import OUTLIER_TIMES, QUANTILES, Summary

if TYPE_CHECKING:
    from gradpipe.stages.collect.estimate import Estimate  # a store is shown without torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Zeros:
    """How many of some weights are zero."""

    zeros: int
    size: int

    @classmethod
    def sum(cls, parts: Iterable[Zeros | LayerResult]) -> Self:
        """Of all the parts, or layers."""
        pairs = [(x.zeros, x.size) for x in parts]
        return cls(zeros=sum(x for x, _ in pairs), size=sum(x for _, x in pairs))

    @property
    def sparsity(self) -> float:
        """The share of weights that are zero."""
        return self.zeros / max(self.size, 1)


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

    def to_json(self) -> dict[str, Any]:
        """A layer's entry in `pruning.json`."""
        return {
            "requested": self.requested,
            "pattern": self.pattern,
            "achieved": self.achieved,
            "zeros": self.zeros,
            "size": self.size,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneOrder:
    """What one checkpoint was asked to become, and from what: known before anything is written.

    Nothing here depends on where files lie, or on other targets of the same run.
    """

    gradpipe: str  # the version
    model: str  # a Hub id, or a local folder's own name
    revision: str | None
    store: str  # digest
    method: str  # its name, or a formula
    score: str | None  # the formula; None for a solver
    update: str
    curvature: str
    allocation: str  # a rule's name, or a file's own name and the digest of its content
    statistics: tuple[str, ...]  # read from the store
    alpha: float
    grad_norm: str
    group: str
    pattern: str  # n:m, or unstructured
    command: str

    @property
    def identity(self) -> dict[str, object]:
        """What all shards of one command agree on, as `pruning.json` has it.

        The command names every option, and every file that shapes the result by its content.
        """
        names = ("gradpipe", "model", "revision", "store", "allocation", "command")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneReport:
    """All that is known of one written checkpoint: `pruning.json`, its card and tables."""

    order: PruneOrder
    requested: float  # sparsity, over all pruned layers
    layers: tuple[LayerResult, ...]
    blocks: Zeros  # of all weights of the blocks, pruned or not
    file: Zeros  # of all weights of the checkpoint
    dense: Mapping[str, int]  # matrices of the blocks -> weights of theirs that no layer covers
    mismatched_layers: tuple[str, ...]  # pruned though they are not those that were measured
    unseen_layers: tuple[str, ...]  # that no calibration token reached
    notes: tuple[str, ...]  # messages for the user

    @property
    def achieved(self) -> float:
        """Sparsity found in the written files, over all pruned layers."""
        return Zeros.sum(self.layers).sparsity

    def to_json(self) -> dict[str, Any]:
        """`pruning.json`, as plain JSON values."""
        order = asdict(self.order) | {"statistics": list(self.order.statistics)}
        command = order.pop("command")
        return {
            **order,
            "mismatched_layers": list(self.mismatched_layers),
            "unseen_layers": list(self.unseen_layers),
            "notes": list(self.notes),
            "command": command,
            "requested_sparsity": self.requested,
            "achieved_sparsity": self.achieved,
            "blocks_sparsity": self.blocks.sparsity,
            "file_sparsity": self.file.sparsity,
            "dense_weights": dict(self.dense),
            "layers": {layer.name: layer.to_json() for layer in self.layers},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneResult:
    """One written checkpoint: where it is, and its report."""

    folder: Path
    label: str
    report: PruneReport

    @property
    def requested(self) -> float:
        """Sparsity asked for, over all pruned layers."""
        return self.report.requested

    @property
    def achieved(self) -> float:
        """Sparsity found in the written files, over all pruned layers."""
        return self.report.achieved

    @property
    def layers(self) -> tuple[LayerResult, ...]:
        """Each layer as read back."""
        return self.report.layers

    def _repr_html_(self) -> str:
        report = self.report
        facts = {
            "method": report.order.method,
            "pattern": report.order.pattern,
            "asked for": f"{self.requested:.4f}",
            f"zeros of {len(self.layers)} pruned layers": f"{self.achieved:.4f}",
            "of all of the blocks": f"{report.blocks.sparsity:.4f}",
            "of the whole file": f"{report.file.sparsity:.4f}",
        }
        return as_html(str(self.folder), facts)


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

    def _repr_html_(self) -> str:
        return as_html(f"perplexity {self.perplexity:.4f}", asdict(self))


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

    def _repr_html_(self) -> str:
        return as_html(f"top-1 {100 * self.top1:.2f} %", asdict(self))


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReport:
    """What a collection would make of a model, and what it would take."""

    name: str
    architecture: str
    task: str
    dtype: str
    blocks: str  # the path of their list
    num_blocks: int
    num_layers: int
    num_layer_weights: int
    dense: tuple[str, ...]  # what of the blocks stays dense and why, a line for each reason
    estimate: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What a machine has, and what it would do with a model."""

    versions: dict[str, str]
    devices: dict[str, str]  # `cuda:0` -> what it is
    free_memory: dict[str, int]  # bytes, of each device
    free_disk: int  # bytes, in the current folder
    model: ModelReport | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """What a store's statistics look like, in the order of its blocks."""

    store: str
    digest: str
    layers: tuple[Summary, ...]
    blocks: tuple[Summary, ...]

    def to_json(self) -> dict[str, Any]:
        """As `--json` has it."""
        return {
            "store": self.store,
            "digest": self.digest,
            "quantiles": list(QUANTILES),
            "outlier_times": OUTLIER_TIMES,
            "layers": [x.to_json() for x in self.layers],
            "blocks": [x.to_json() for x in self.blocks],
        }
