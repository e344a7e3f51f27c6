"""Calibration and evaluation text: from presets, the Hub or local files to token windows.

Windows are full, never padded. Calibration draws them as GPTQ, Wanda and GBLM-Pruner do, with
the same generator, so that a seed means the same samples here as there. Evaluation joins the
text and cuts it into windows that do not overlap.
"""

import gzip
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import huggingface_hub
import pyarrow.parquet

from gradpipe.errors import InputError, did_you_mean, one_line
from gradpipe.options import is_given, refuse_given
from gradpipe.stages.data.chat import CHAT_COLUMNS, ChatTemplate
from gradpipe.stages.data.config import FILE_KINDS, PRESETS, SPLITS, DataConfig, Use, split_name
from gradpipe.stages.data.documents import Column, Documents, Reader
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
    is_chat: bool = False  # conversations, with special tokens of the template's


def load_text(data: DataConfig, use: Use, tokenizer: Any) -> Text:
    """The text behind `data`, of conversations by the tokenizer's chat template.

    Raises InputError if there is none, if it has no such column, or if a row of it is odd.
    """
    if data.name == "stdlib":
        split: Literal["train", "heldout"] = "train" if use == "calibration" else "heldout"
        documents = [text for _, text in stdlib_documents(split)]
        return Text(documents=documents, revision=None, separator=DOCUMENT_SEPARATOR, joined=False)
    if data.name == "c4":
        return _load_c4(use)
    if data.name == "wikitext2":
        return _load_wikitext2(use)
    if Path(data.name).exists():
        return _load_local(data, tokenizer)
    return _load_hub(data, use, tokenizer)


@contextmanager
def bars_on_terminals() -> Iterator[None]:
    """Meanwhile `datasets` shows its progress on a terminal alone, as we show ours."""
    is_to_hide = not (sys.stderr.isatty() or datasets.are_progress_bars_disabled())
    if is_to_hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if is_to_hide:
            datasets.enable_progress_bars()


def _load_c4(use: Use) -> Text:
    """One shard of C4, as the field uses it."""
    hub_id, revision = _C4
    split = SPLITS["c4"][use]
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
    split, separator = SPLITS["wikitext2"][use], " " if use == "calibration" else "\n\n"
    rows = _load_file(hub_id, f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet", revision)
    return Text(documents=rows["text"], revision=revision, separator=separator, joined=True)


def _load_file(hub_id: str, file: str, revision: str) -> Any:
    """The rows of one file of a dataset at just this commit, from the cache if it is there."""
    kind = "parquet" if file.endswith(".parquet") else "json"
    try:
        path = huggingface_hub.hf_hub_download(hub_id, file, repo_type="dataset", revision=revision)
        with bars_on_terminals():
            return datasets.load_dataset(kind, data_files=path, split="train")
    except Exception as error:  # the Hub's client and datasets raise from many families
        raise _unknown_dataset(hub_id, error) from error


def _load_hub(data: DataConfig, use: Use, tokenizer: Any) -> Text:
    """One column of any dataset of the Hub; its rows are looked at when they are drawn."""
    rows, revision = load_rows(data, use)
    name = _choose_column(data.name, data, rows.column_names)
    return _text(data.name, [_column(data.name, name, rows[name], tokenizer)], revision)


def load_rows(data: DataConfig, use: Use) -> tuple[Any, str]:
    """The rows of any dataset of the Hub, and their commit, which is to be recorded."""
    split = split_name(data, use)
    revision = _commit(data.name, data.revision)
    try:
        builder = datasets.load_dataset_builder(data.name, data.config, revision=revision)
        with bars_on_terminals():
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
        f"fetched ({one_line(error)}){did_you_mean(name, PRESETS)}"
    )


def _load_local(data: DataConfig, tokenizer: Any) -> Text:
    """The text of one file, or of every file of a known kind below a folder, in name order."""
    path = Path(data.name)
    below = [] if path.is_file() else [p for p in path.rglob("*") if _kind(p) and p.is_file()]
    files = sorted(below) or [path]
    if not all(p.is_file() and _kind(p) for p in files):
        raise InputError(f"dataset {path}: expected a file or folder of {', '.join(FILE_KINDS)}")
    if all(_kind(p) == "text" for p in files):
        refuse_given(data, ("text_column",), f"dataset {path} has no table")
    columns = [_read_file(file, data, tokenizer) for file in files]
    return _text(data.name, [column for column in columns if column.values], None)


def _text(name: str, columns: Sequence[Column], revision: str | None) -> Text:
    """Columns as one text; InputError if some hold conversations and others plain text."""
    by_kind = {column.reader.is_chat: column.name for column in columns}
    if len(by_kind) > 1:
        raise InputError(
            f"dataset {name} holds conversations ({by_kind[True]}) and text ({by_kind[False]}): "
            "expected one kind: put them into folders of their own, and give one"
        )
    is_chat = True in by_kind
    return Text(
        documents=Documents(columns),
        revision=revision,
        separator="" if is_chat else "\n\n",  # a template ends what it makes
        joined=False,
        is_chat=is_chat,
    )


def _kind(path: Path) -> str | None:
    return next((kind for end, kind in FILE_KINDS.items() if path.name.endswith(end)), None)


def _read_file(path: Path, data: DataConfig, tokenizer: Any) -> Column:
    """A text file is one document; a table has one in each row. All rows are looked at."""
    kind = _kind(path)
    try:
        if kind == "text":
            text = path.read_text(encoding="utf-8-sig")
            return Column(name=str(path), column="", values=[text], reader=Reader())
        name, values = (_json_values if kind == "json" else _parquet_values)(path, data)
    except InputError:
        raise
    except Exception as error:  # pyarrow, json and gzip raise from many families
        raise InputError(f"dataset {path}: cannot read it as {kind}: {one_line(error)}") from error
    column = _column(str(path), name, values, tokenizer)
    column.check()
    return column


def _column(name: str, column: str, values: Sequence[Any], tokenizer: Any) -> Column:
    """A table's column, which holds conversations by its name or by its first value."""
    is_chat = column in CHAT_COLUMNS or (len(values) > 0 and isinstance(values[0], list))
    reader = ChatTemplate(tokenizer, name) if is_chat else Reader()
    return Column(name=name, column=column, values=values, reader=reader)


def _choose_column(name: str, data: DataConfig, columns: Sequence[str]) -> str:
    """The column that is asked for; unasked `text`, or else one that holds conversations."""
    asked = data.text_column
    choices = (asked,) if is_given(data, "text_column") else (asked, *CHAT_COLUMNS)
    found = next((column for column in choices if column in columns), None)
    if found is None:
        raise _no_column(name, asked, columns)
    return found


def _no_column(name: str, asked: str, columns: Sequence[str]) -> InputError:
    return InputError(
        f"dataset {name} has no text column {asked!r}; it has {', '.join(columns) or 'none'}: "
        "choose with --text-column"
    )


def _json_values(path: Path, data: DataConfig) -> tuple[str, list[Any]]:
    """The column, and its value in each line of a .jsonl file; blank lines are none."""
    content = path.read_bytes()
    is_packed = path.name.endswith(".gz")
    text = (gzip.decompress(content) if is_packed else content).decode("utf-8-sig")
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    column, values = "", list[Any]()
    for number, line in lines:
        row = _json_row(number, line)
        column = column or _choose_column(str(path), data, [*row])  # by the first row
        if column not in row:
            raise _no_column(str(path), column, [*row])
        values.append(row[column])
    return column, values


def _json_row(number: int, line: str) -> dict[str, Any]:
    """The object in a line; without columns if it is another value."""
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error
    return row if isinstance(row, dict) else {}


def _parquet_values(path: Path, data: DataConfig) -> tuple[str, list[Any]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        column = _choose_column(str(path), data, file.schema_arrow.names)
        values: list[Any] = file.read(columns=[column]).column(column).to_pylist()
    return column, values
