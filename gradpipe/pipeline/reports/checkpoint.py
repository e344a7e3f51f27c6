"""The report and the model card beside a pruned checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from gradpipe.pipeline.places import REPORT
from gradpipe.pipeline.reports.results import PruneReport
from gradpipe.store.objects import write_durably


def write_report(folder: Path, report: PruneReport) -> None:
    """Write `pruning.json` and the model card."""
    document = json.dumps(report.to_json(), indent=1) + "\n"
    write_durably(folder / REPORT, document.encode())
    write_durably(folder / "README.md", _model_card(report).encode())


def _model_card(report: PruneReport) -> str:
    """A README.md that the Hub shows."""
    order = report.order
    return f"""---
base_model: {order.model}
tags: [pruned, sparse, gradpipe]
---
# {order.model}, pruned

| | |
|---|---|
| method | {order.method} |
| pattern | {order.pattern} |
| sparsity of the pruned layers | {report.achieved:.4f} |
| of all weights of the blocks | {report.blocks.sparsity:.4f} |
| of the whole checkpoint | {report.file.sparsity:.4f} |
| statistics | {", ".join(order.statistics) or "none"} |
| gradient store | `{order.store}` |

Made with gradpipe {order.gradpipe}:

    {order.command}

Sparsity of each layer: `pruning.json`. The weights are dense tensors with zeros in them.
"""
