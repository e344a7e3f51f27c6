"""Where samples come from, and which names are presets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from gradpipe.errors import InputError
from gradpipe.options import Option, check_options, refuse_given, unasked

Use = Literal["calibration", "evaluation"]
FILE_KINDS = {".txt": "text", ".jsonl": "json", ".jsonl.gz": "json", ".parquet": "parquet"}
TOKENS = ".npy"  # how the name of a file of tokens ends

SPLITS: dict[str, dict[Use, str]] = {  # of each preset
    "c4": {"calibration": "train", "evaluation": "validation"},
    "wikitext2": {"calibration": "train", "evaluation": "test"},
    "stdlib": {"calibration": "train", "evaluation": "heldout"},
}

PRESETS = tuple(SPLITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where samples come from: text, tokens or labelled images."""

    name: Annotated[
        str,
        Option(
            flag="dataset",
            help=f"{', '.join(PRESETS)}, .txt/.jsonl[.gz]/.parquet files, .npy tokens, a Hub id; "
            "for images a folder of class folders.",
            is_recorded=False,  # but its label is, and the configuration
        ),
    ] = "c4"
    config: Annotated[
        str | None,
        Option(flag="dataset-config", help="Configuration of a Hub dataset.", is_recorded=False),
    ] = None
    split: Annotated[
        str | None,
        Option(help="Split of a Hub dataset.", default="train to calibrate, test to evaluate"),
    ] = None
    revision: Annotated[
        str | None,
        Option(help="Commit of a Hub dataset.", default="the newest, which is recorded"),
    ] = None
    text_column: Annotated[str, Option(help="Column that holds the text.")] = unasked("text")

    @property
    def label(self) -> str:
        """The name that stores record: the preset, the Hub id, or the last part of a local path."""
        return Path(self.name).resolve().name if Path(self.name).exists() else self.name

    def __post_init__(self) -> None:
        """Refuse an empty name, which would be the current folder, and options without effect."""
        if not self.name:
            raise InputError(f"--dataset '': expected one of {', '.join(PRESETS)}, a path or an id")
        check_options(self)
        if self.name in PRESETS or self.name.endswith((".txt", TOKENS)):
            why = f"only tables have columns, --dataset {self.name} does not"
            refuse_given(self, ("text_column",), why)
        if self.name in PRESETS or Path(self.name).exists():
            why = f"only data sets of the Hub have one, --dataset {self.name} does not"
            refuse_given(self, ("config", "split", "revision"), why)


def split_name(data: DataConfig, use: Use) -> str | None:
    """The split that is read of `data`; None for a local file or folder, which has none."""
    if data.name in SPLITS:
        return SPLITS[data.name][use]
    if Path(data.name).exists():
        return None
    return data.split or ("train" if use == "calibration" else "test")
