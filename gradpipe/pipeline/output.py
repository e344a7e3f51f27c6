"""What a pruning gives: results, as read back, and the report and model card that describe them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gradpipe.pipeline.destination import REPORT
from gradpipe.store.objects import write_durably


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


def write_report(folder: Path, report: dict[str, Any], result: PruneResult) -> None:
    """Write `pruning.json` and the model card."""
    document = {
        "gradpipe": version("gradpipe"),
        **report,
        "requested_sparsity": result.requested,
        "achieved_sparsity": result.achieved,
        "layers": {
            layer.name: {
                "requested": layer.requested,
                "pattern": layer.pattern,
                "achieved": layer.achieved,
                "zeros": layer.zeros,
                "size": layer.size,
            }
            for layer in result.layers
        },
    }
    write_durably(folder / REPORT, (json.dumps(document, indent=1) + "\n").encode())
    write_durably(folder / "README.md", _model_card(document).encode())


def _model_card(report: dict[str, Any]) -> str:
    """A README.md that the Hub shows."""
    return f"""---
base_model: {report["model"]}
tags: [pruned, sparse, gradpipe]
---
# {report["model"]}, pruned

| | |
|---|---|
| method | {report["method"]} |
| pattern | {report["pattern"]} |
| sparsity of the pruned layers | {report["achieved_sparsity"]:.4f} |
| statistics | {", ".join(report["statistics"]) or "none"} |
| gradient store | `{report["store"]}` |

Made with gradpipe {report["gradpipe"]}:

    {report["command"]}

Sparsity of each layer: `pruning.json`. The weights are dense tensors with zeros in them.
"""
