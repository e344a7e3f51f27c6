"""Where samples come from, and which names are presets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gradpipe.errors import InputError

Use = Literal["calibration", "evaluation"]

FILE_KINDS = {".txt": "text", ".jsonl": "json", ".jsonl.gz": "json", ".parquet": "parquet"}

_TEXT_COLUMN = "text"

_SPLITS: dict[str, dict[Use, str]] = {
    "c4": {"calibration": "train", "evaluation": "validation"},
    "wikitext2": {"calibration": "train", "evaluation": "test"},
    "stdlib": {"calibration": "train", "evaluation": "heldout"},
}

PRESETS = tuple(_SPLITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where samples come from: text, tokens or labelled images."""

    name: str = "c4"  # a preset, a file or folder, or a Hub id
    config: str | None = None  # Hub only: the dataset's configuration
    split: str | None = None  # Hub only: default train to calibrate, test to evaluate
    revision: str | None = None  # Hub only: a commit; default the newest, which is recorded
    text_column: str = _TEXT_COLUMN

    @property
    def label(self) -> str:
        """The name that stores record: the preset, the Hub id, or the last part of a local path."""
        return Path(self.name).resolve().name if Path(self.name).exists() else self.name

    def __post_init__(self) -> None:
        """Refuse an empty name, which would be the current folder, and options without effect."""
        if not self.name:
            raise InputError(f"--dataset '': expected one of {', '.join(PRESETS)}, a path or an id")
        if self.text_column != _TEXT_COLUMN and (
            self.name in PRESETS or self.name.endswith((".txt", ".npy"))
        ):
            raise InputError(
                f"--text-column {self.text_column}: only tables have columns, --dataset "
                f"{self.name} does not: leave it out"
            )
        if self.name not in PRESETS and not Path(self.name).exists():
            return
        options = {"dataset-config": self.config, "split": self.split, "revision": self.revision}
        for flag, value in options.items():
            if value is not None:
                raise InputError(
                    f"--{flag} {value}: only data sets of the Hub have one, --dataset {self.name} "
                    "does not: leave it out"
                )


def split_name(data: DataConfig, use: Use) -> str | None:
    """The split that is read of `data`; None for a local file or folder, which has none."""
    if data.name in _SPLITS:
        return _SPLITS[data.name][use]
    if Path(data.name).exists():
        return None
    return data.split or ("train" if use == "calibration" else "test")
