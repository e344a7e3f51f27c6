"""The page of model types, made from the verdicts."""

from __future__ import annotations

import json
from pathlib import Path

VERDICTS = Path(__file__).with_name("verdicts.json")


def read_verdicts() -> dict[str, str]:
    """Case -> verdict, as committed."""
    verdicts: dict[str, str] = json.loads(VERDICTS.read_text()) if VERDICTS.is_file() else {}
    return verdicts


def page(verdicts: dict[str, str]) -> str:
    """`docs/models.md`."""
    return ""
