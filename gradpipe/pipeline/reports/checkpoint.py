"""The report and the model card beside a pruned checkpoint."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gradpipe.pipeline.places import REPORT
from gradpipe.pipeline.reports.results import PruneResult
from gradpipe.store.objects import write_durably


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
