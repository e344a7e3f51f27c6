"""Calibration and evaluation text: from presets, the Hub or local files to token windows.

Windows are full, never padded. Calibration draws them as GPTQ, Wanda and GBLM-Pruner do, with
the same generator, so that a seed means the same samples here as there. Evaluation joins the
text and cuts it into windows that do not overlap.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import huggingface_hub
import pyarrow.parquet

from gradpipe.errors import InputError, one_line
from gradpipe.options import refuse_given
from gradpipe.stages.data.config import _SPLITS, FILE_KINDS, PRESETS, DataConfig, Use, split_name
from gradpipe.stages.data.stdlib import DOCUMENT_SEPARATOR, stdlib_documents

_C4 = ("allenai/c4", "607bd4c8450a42878aa9ddc051a65a055450ef87")

_WIKITEXT = ("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3")

_C4_EVALUATION = (1100, 256)  # documents joined, windows kept: the literature's choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Documents, and how they are to be used."""

    documents: Sequence[str]
    revision: str | None
    separator: str  # between documents when they are joined
    joined: bool  # draw windows from the joined text, not from single documents
    max_windows: int | None = None


def load_text(data: DataConfig, use: Use) -> Text:
    """The text behind `data`; InputError if there is none, or it has no such column."""
    if data.name == "stdlib":
        split: Literal["train", "heldout"] = "train" if use == "calibration" else "heldout"
        documents = [text for _, text in stdlib_documents(split)]
        return Text(documents=documents, revision=None, separator=DOCUMENT_SEPARATOR, joined=False)
    if data.name == "c4":
        return _load_c4(use)
    if data.name == "wikitext2":
        return _load_wikitext2(use)
    if Path(data.name).exists():
        documents = _local_documents(data)
        return Text(documents=documents, revision=None, separator="\n\n", joined=False)
    return _load_hub(data, use)


def _load_c4(use: Use) -> Text:
    """One shard of C4, as the field uses it."""
    hub_id, revision = _C4
    split = _SPLITS["c4"][use]
    num_files = 1024 if use == "calibration" else 8
    file = f"en/c4-{split}.00000-of-{num_files:05d}.json.gz"
    rows = _load_file(hub_id, file, revision)
    if use == "calibration":
        return Text(documents=rows["text"], revision=revision, separator=" ", joined=False)
    num_documents, num_windows = _C4_EVALUATION
    return Text(
        documents=rows[:num_documents]["text"],
        revision=revision,
        separator=" ",
        joined=True,
        max_windows=num_windows,
    )


def _load_wikitext2(use: Use) -> Text:
    """WikiText-2 raw; train rows joined by spaces to calibrate, test rows by blank lines."""
    hub_id, revision = _WIKITEXT
    split, separator = _SPLITS["wikitext2"][use], " " if use == "calibration" else "\n\n"
    rows = _load_file(hub_id, f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet", revision)
    return Text(documents=rows["text"], revision=revision, separator=separator, joined=True)


def _load_file(hub_id: str, file: str, revision: str) -> Any:
    """The rows of one file of a dataset at just this commit, from the cache if it is there."""
    kind = "parquet" if file.endswith(".parquet") else "json"
    try:
        path = huggingface_hub.hf_hub_download(hub_id, file, repo_type="dataset", revision=revision)
        return datasets.load_dataset(kind, data_files=path, split="train")
    except Exception as error:  # the Hub's client and datasets raise from many families
        raise _unknown_dataset(hub_id, error) from error


def _load_hub(data: DataConfig, use: Use) -> Text:
    """The text column of any dataset of the Hub."""
    rows, revision = load_rows(data, use)
    if data.text_column not in rows.column_names:
        raise _no_column(data.name, data.text_column, rows.column_names)
    documents = rows[data.text_column]
    return Text(documents=documents, revision=revision, separator="\n\n", joined=False)


def load_rows(data: DataConfig, use: Use) -> tuple[Any, str]:
    """The rows of any dataset of the Hub, and their commit, which is to be recorded."""
    split = split_name(data, use)
    revision = _commit(data.name, data.revision)
    try:
        builder = datasets.load_dataset_builder(data.name, data.config, revision=revision)
        builder.download_and_prepare()
        rows = builder.as_dataset(split=split)
    except Exception as error:  # the Hub's client and datasets raise from many families
        raise _unknown_dataset(data.name, error) from error
    if revision not in {None, builder.hash}:  # without the Hub, `datasets` takes the last cached
        raise InputError(
            f"dataset {data.name}: cannot fetch commit {revision}, and the cache gives "
            f"{builder.hash}: connect to the Hub, or choose that with --revision"
        )
    return rows, builder.hash


def _commit(name: str, revision: str | None) -> str | None:
    """The commit that `revision`, by default the newest, means now: a branch or tag can move."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return revision
    try:
        return huggingface_hub.dataset_info(name, revision=revision).sha
    except Exception as error:  # the Hub's client and datasets raise from many families
        raise _unknown_dataset(name, error) from error


def _unknown_dataset(name: str, error: Exception) -> InputError:
    return InputError(
        f"dataset {name}: expected one of {', '.join(PRESETS)}, a file or folder of "
        f"{', '.join(FILE_KINDS)} (for image classifiers of images), or a Hub id that can be "
        f"fetched ({one_line(error)})"
    )


def _local_documents(data: DataConfig) -> list[str]:
    """The documents of one file, or of every file of a known kind below a folder, in name order."""
    path = Path(data.name)
    below = [] if path.is_file() else [p for p in path.rglob("*") if _kind(p) and p.is_file()]
    files = sorted(below) or [path]
    if not all(p.is_file() and _kind(p) for p in files):
        raise InputError(f"dataset {path}: expected a file or folder of {', '.join(FILE_KINDS)}")
    if all(_kind(p) == "text" for p in files):
        refuse_given(data, ("text_column",), f"dataset {path} has no table")
    return [document for file in files for document in _file_documents(file, data.text_column)]


def _kind(path: Path) -> str | None:
    return next((kind for end, kind in FILE_KINDS.items() if path.name.endswith(end)), None)


def _file_documents(path: Path, column: str) -> list[str]:
    """A text file is one document; a table has one in each row."""
    kind = _kind(path)
    try:
        if kind == "text":
            return [path.read_text(encoding="utf-8-sig")]
        values = _json_values(path, column) if kind == "json" else _parquet_values(path, column)
    except InputError:
        raise
    except Exception as error:  # pyarrow, json and gzip raise from many families
        raise InputError(f"dataset {path}: cannot read it as {kind}: {one_line(error)}") from error
    for number, value in enumerate(values, 1):
        if oddity := _oddity(value):
            raise InputError(
                f"dataset {path}: row {number} holds {oddity} under {column!r}, expected text: "
                "mend it, or choose with --text-column"
            )
    return values


def _oddity(value: object) -> str | None:
    """What keeps a value from being text, None if it is."""
    if not isinstance(value, str):
        return type(value).__name__
    return "half a surrogate pair" if re.search("[\ud800-\udfff]", value) else None


def _json_values(path: Path, column: str) -> list[Any]:
    """One value from each line of a .jsonl file; blank lines are none."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.name.endswith(".gz") else data).decode("utf-8-sig")
    return [
        _json_value(path, number, line, column)
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def _json_value(path: Path, number: int, line: str, column: str) -> Any:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error
    if not isinstance(row, dict) or column not in row:
        raise _no_column(str(path), column, [*row] if isinstance(row, dict) else [])
    return row[column]


def _parquet_values(path: Path, column: str) -> list[Any]:
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise _no_column(str(path), column, names)
        values: list[Any] = file.read(columns=[column]).column(column).to_pylist()
    return values


def _no_column(name: str, column: str, columns: Sequence[str]) -> InputError:
    return InputError(
        f"dataset {name} has no text column {column!r}; it has {', '.join(columns) or 'none'}: "
        "choose with --text-column"
    )
