"""The report and the model card beside a pruned checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from gradpipe.pipeline.places import REPORT
from gradpipe.pipeline.reports.card import CARD, model_card
from gradpipe.pipeline.reports.results import PruneReport
from gradpipe.store.objects import write_durably


def write_report(folder: Path, report: PruneReport) -> None:
    """Write `pruning.json` and the model card."""
    document = json.dumps(report.to_json(), indent=1) + "\n"
    write_durably(folder / REPORT, document.encode())
    write_durably(folder / CARD, model_card(report).encode())
