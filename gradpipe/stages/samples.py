"""Calibration and evaluation text: from presets, the Hub or local files to token windows.

Windows are full, never padded. Calibration draws them as GPTQ, Wanda and GBLM-Pruner do, with
the same generator, so that a seed means the same samples here as there. Evaluation joins the
text and cuts it into windows that do not overlap.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import huggingface_hub
import numpy as np
import numpy.typing as npt
import pyarrow.parquet

from gradpipe.errors import InputError, one_line
from gradpipe.stages.embedded import DOCUMENT_SEPARATOR, stdlib_documents
from gradpipe.store.gradients import Calibration
from gradpipe.store.schema import SampleSpec

Use = Literal["calibration", "evaluation"]
FILE_KINDS = {".txt": "text", ".jsonl": "json", ".jsonl.gz": "json", ".parquet": "parquet"}

_TEXT_COLUMN = "text"
_C4 = ("allenai/c4", "607bd4c8450a42878aa9ddc051a65a055450ef87")
_WIKITEXT = ("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3")
_SPLITS: dict[str, dict[Use, str]] = {
    "c4": {"calibration": "train", "evaluation": "validation"},
    "wikitext2": {"calibration": "train", "evaluation": "test"},
    "stdlib": {"calibration": "train", "evaluation": "heldout"},
}
PRESETS = tuple(_SPLITS)
_C4_EVALUATION = (1100, 256)  # documents joined, windows kept: the literature's choice


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Documents, and how they are to be used."""

    documents: Sequence[str]
    revision: str | None
    separator: str  # between documents when they are joined
    joined: bool  # draw windows from the joined text, not from single documents
    max_windows: int | None = None


def split_name(data: DataConfig, use: Use) -> str | None:
    """The split that is read of `data`; None for a local file or folder, which has none."""
    if data.name in _SPLITS:
        return _SPLITS[data.name][use]
    if Path(data.name).exists():
        return None
    return data.split or ("train" if use == "calibration" else "test")


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
        documents = _local_documents(Path(data.name), data.text_column)
        return Text(documents=documents, revision=None, separator="\n\n", joined=False)
    return _load_hub(data, use)


def draw_samples(
    name: str,
    text: Text,
    tokenizer: Any,
    num_samples: int,
    seq_len: int,
    seed: int,
) -> tuple[SampleSpec, Calibration]:
    """Draw `num_samples` windows of `seq_len` tokens, each at a random place of a random document.

    Documents that are too short are passed over. Where all of them are, or where that is the
    preset's way, windows come from the joined text. Raises InputError if that is too short.
    """
    generator = random.Random(seed)
    drawn = None
    if not text.joined:
        drawn = _draw_from_documents(text.documents, tokenizer, num_samples, seq_len, generator)
    sampling = "joined" if drawn is None else "document"
    if drawn is None:
        generator.seed(seed)
        drawn = _draw_from_joined(name, text, tokenizer, num_samples, seq_len, generator)
    calibration = Calibration(
        arrays={
            "input_ids": np.array([ids for ids, _ in drawn], dtype=np.int32),
            "sources": np.array([source for _, source in drawn], dtype=np.int64),
        }
    )
    spec = SampleSpec(
        dataset=name,
        revision=text.revision,
        sampling=sampling,
        seed=seed,
        num_samples=num_samples,
        seq_len=seq_len,
        digest=calibration.digest,
    )
    return spec, calibration


def evaluation_windows(
    name: str,
    text: Text,
    tokenizer: Any,
    seq_len: int,
    max_windows: int | None,
) -> npt.NDArray[np.int64]:
    """The joined text in windows that do not overlap, (windows, seq_len); the tail is dropped."""
    ids = _tokenize(tokenizer, text.separator.join(text.documents))
    count = len(ids) // seq_len
    limits = [limit for limit in (max_windows, text.max_windows) if limit is not None]
    if count == 0:
        raise _too_short(name, len(ids), seq_len)
    count = min([count, *limits])
    return np.array(ids[: count * seq_len], dtype=np.int64).reshape(count, seq_len)


_Drawn = list[tuple[list[int], tuple[int, int]]]  # tokens; document (-1 if joined), first token


def _draw_from_documents(
    documents: Sequence[str],
    tokenizer: Any,
    num_samples: int,
    seq_len: int,
    generator: random.Random,
) -> _Drawn | None:
    """Windows of single documents; None if no document is longer than `seq_len` tokens."""
    short: set[int] = set()
    drawn: _Drawn = []
    while len(drawn) < num_samples:
        if len(short) == len(documents):
            return None
        index = generator.randint(0, len(documents) - 1)
        if index in short:
            continue
        ids = _tokenize(tokenizer, documents[index])
        if len(ids) <= seq_len:
            short.add(index)
            continue
        start = generator.randint(0, len(ids) - seq_len - 1)
        drawn.append((ids[start : start + seq_len], (index, start)))
    return drawn


def _draw_from_joined(
    name: str,
    text: Text,
    tokenizer: Any,
    num_samples: int,
    seq_len: int,
    generator: random.Random,
) -> _Drawn:
    ids = _tokenize(tokenizer, text.separator.join(text.documents))
    if len(ids) <= seq_len:
        raise _too_short(name, len(ids), seq_len)
    starts = [generator.randint(0, len(ids) - seq_len - 1) for _ in range(num_samples)]
    return [(ids[start : start + seq_len], (-1, start)) for start in starts]


def _tokenize(tokenizer: Any, text: str) -> list[int]:
    """Token ids; `verbose=False` because windows are cut later, so no text is too long."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def _too_short(name: str, num_tokens: int, seq_len: int) -> InputError:
    return InputError(
        f"dataset {name} is too short: {num_tokens} tokens in all, --seq-len {seq_len} needs more; "
        "give more text or a smaller --seq-len"
    )


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


def _local_documents(path: Path, column: str) -> list[str]:
    """The documents of one file, or of every file of a known kind below a folder, in name order."""
    below = [] if path.is_file() else [p for p in path.rglob("*") if _kind(p) and p.is_file()]
    files = sorted(below) or [path]
    if not all(p.is_file() and _kind(p) for p in files):
        raise InputError(f"dataset {path}: expected a file or folder of {', '.join(FILE_KINDS)}")
    return [document for file in files for document in _file_documents(file, column)]


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
