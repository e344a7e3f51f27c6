"""Text, tokens and gradient files that cannot be used: each is named, with its fault."""

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests.support.texts import SENTENCE
from tests.support.workplace import (
    COLLECT,
    EVAL,
    IMPORT,
    LAYER,
    PLANTED,
    Hostile,
    Refused,
    gblm_tensors,
)

# ---- texts ----


def _write(data: bytes | str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data if isinstance(data, bytes) else data.encode())


def _parquet(path: Path, **columns: list[object]) -> None:
    pq.write_table(pa.table(columns), path)


def _truncated_parquet(path: Path) -> None:
    _parquet(path, text=[SENTENCE] * 20)
    path.write_bytes(path.read_bytes()[:-10])


def _array(values: np.ndarray) -> Callable[[Path], object]:
    return lambda path: np.save(path, values)


def _pickled_array(path: Path) -> None:
    np.save(path, np.array([{"not": "tokens"}], dtype=object), allow_pickle=True)


def _archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, ids=np.ones(99, int))


_ROW = json.dumps({"text": SENTENCE * 20}) + "\n"
_ROW_OF_ANOTHER_NAME = json.dumps({"content": SENTENCE * 20}) + "\n"
_COLUMN = ("has no text column 'text'", "it has content", "--text-column")


@pytest.mark.parametrize("command", [COLLECT, EVAL])
@pytest.mark.parametrize(
    ("name", "write", "says"),
    [
        ("a.txt", _write("the fox"), ("too short", "tokens in all", "more text or a smaller")),
        ("a.txt", _write(""), ("too short", "0 tokens")),
        ("a.txt", _write(b"\xe9t\xe9 " * 99), ("cannot read it as text", "utf-8")),
        ("a.csv", _write("text\nfox\n"), ("expected a file or folder of .txt, .jsonl",)),
        ("a.jsonl", _write(""), ("too short", "0 tokens")),
        ("a.jsonl", _write("\n\n"), ("too short", "0 tokens")),
        ("a.jsonl", _write(_ROW + "{broken\n"), ("cannot read it as json", "line 2")),
        ("a.jsonl", _write(b"\xff\xfe\n" + _ROW.encode()), ("cannot read it as json", "utf-8")),
        ("a.jsonl", _write(_ROW_OF_ANOTHER_NAME), _COLUMN),
        ("a.jsonl", _write(_ROW + _ROW_OF_ANOTHER_NAME), _COLUMN),
        ("a.jsonl", _write(_ROW + "[1]\n"), ("has no text column 'text'", "it has none")),
        ("a.jsonl", _write('{"text": null}\n'), ("row 1 holds NoneType under 'text'",)),
        ("a.jsonl", _write('{"text": "\\ud800"}\n'), ("row 1 holds half a surrogate pair",)),
        ("a.jsonl.gz", _write(_ROW), ("cannot read it as json", "gzip")),
        ("a.jsonl.gz", _write(gzip.compress(_ROW.encode())[:-9]), ("cannot read it as json",)),
        ("a.jsonl.gz", _write(gzip.compress(_ROW_OF_ANOTHER_NAME.encode())), _COLUMN),
        ("a.parquet", _write(""), ("cannot read it as parquet", "0 bytes")),
        ("a.parquet", _write("PAR1 junk PAR1"), ("cannot read it as parquet",)),
        ("a.parquet", _truncated_parquet, ("cannot read it as parquet",)),
        ("a.parquet", lambda path: _parquet(path, content=[SENTENCE]), _COLUMN),
        ("a.parquet", lambda path: _parquet(path, text=[1, 2]), ("row 1 holds int under 'text'",)),
        ("a.parquet", lambda path: _parquet(path, text=[]), ("too short", "0 tokens")),
        ("folder", Path.mkdir, ("expected a file or folder of .txt, .jsonl",)),
        ("a.npy", _write("1 2 3"), ("not a .npy file of tokens",)),
        ("a.npy", _array(np.ones(99)), ("expected token ids", "float64 (99,)")),
        ("a.npy", _array(np.full(99, -1)), ("expected token ids", "int64 (99,)")),
        ("a.npy", _array(np.ones((2, 3, 16), int)), ("expected token ids", "(2, 3, 16)")),
        ("a.npy", _array(np.array([], int)), ("expected token ids", "(0,)")),
        ("a.npy", _array(np.ones(15, int)), ("too short: 15 tokens", "--seq-len is 16")),
        ("a.npy", _array(np.ones((9, 8), int)), ("windows of 8 tokens", "give --seq-len 8")),
        ("a.npy", _array(np.ones((9, 1), int)), ("windows of 1 token", "expected at least 2")),
        ("a.npy", _archive, ("not a .npy file of tokens", "magic string")),
        ("a.npy", _pickled_array, ("not a .npy file of tokens", "Python objects")),
    ],
)
def test_a_text_that_cannot_be_used_is_named(
    refused: Refused,
    tmp_path: Path,
    command: str,
    name: str,
    write: Callable[[Path], object],
    says: tuple[str, ...],
) -> None:
    """Too short, of the wrong kind, damaged, or without the column: the file and the fault."""
    write(tmp_path / name)
    says = (f"dataset {tmp_path / name}", *says)
    refused(command, "--dataset", tmp_path / name, says=says)


@pytest.mark.parametrize("command", [COLLECT, EVAL])
def test_tokens_of_another_model_are_refused(
    refused: Refused, tmp_path: Path, command: str
) -> None:
    """The model has no embedding for them."""
    np.save(tmp_path / "a.npy", np.full(99, 96))
    says = ("model: the text holds token 96", "the embedding has 96", "the file of tokens")
    refused(command, "--dataset", tmp_path / "a.npy", says=says)


@pytest.mark.parametrize("command", [COLLECT, EVAL])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nonesuch", ("dataset nonesuch", "c4, wikitext2, stdlib", "Hub id")),
        ("missing.txt", ("dataset missing.txt", "a file or folder of .txt")),
        ("no/such/data", ("dataset no/such/data", "a file or folder of .txt")),
        ("''", ("--dataset ''", "c4, wikitext2, stdlib")),
        ("short.txt", ("dataset short.txt is too short", "--seq-len 16")),
    ],
)
def test_an_unknown_dataset_is_answered_with_the_known_ones(
    refused: Refused, command: str, name: str, says: tuple[str, ...]
) -> None:
    """A name that is neither a preset, nor a path, nor on the Hub lists what it could be."""
    refused(f"{command} --dataset {name}", says=says)


# ---- the reference's files ----


def _saved(path: Path, **changes: object) -> None:
    model = path.parent / "model"
    torch.save(gblm_tensors(model) | changes, path)


def _truncate(share: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        _saved(path)
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])

    return write


def _replace(key: str, value: object) -> Callable[[Path], None]:
    return lambda path: _saved(path, **{key: value})


_FIRST = "self_attn.q_proj_layer_0"
_NOT_ALONE = ("not a whole file of tensors alone", "GBLM-Pruner")
_NO_DICT = ("expected a dict of float tensors keyed like self_attn.q_proj_layer_0",)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: None, ("no such file", "a .pth file that GBLM-Pruner wrote")),  # noqa: ARG005
        (Path.mkdir, ("no such file", "a .pth file that GBLM-Pruner wrote")),
        (lambda path: torch.save(Hostile(path.with_name(PLANTED)), path), _NOT_ALONE),
        (lambda path: _saved(path, **{_FIRST: Hostile(path.with_name(PLANTED))}), _NOT_ALONE),
        (
            lambda path: path.write_bytes(pickle.dumps(Hostile(path.with_name(PLANTED)))),
            _NOT_ALONE,
        ),
        (_write(""), _NOT_ALONE),
        (_write("junk"), _NOT_ALONE),
        (_write(b"PK\x03\x04junk"), _NOT_ALONE),
        (_truncate(0.1), _NOT_ALONE),
        (_truncate(0.999), _NOT_ALONE),
        (lambda path: torch.save([torch.ones(2)], path), _NO_DICT),
        (lambda path: torch.save({}, path), _NO_DICT),
        (
            lambda path: torch.save(load_file(path.parent / "model/model.safetensors"), path),
            _NO_DICT,
        ),
        (_replace(_FIRST, 1.0), _NO_DICT),
        (_replace(_FIRST, torch.zeros(32, 32, dtype=torch.int32)), _NO_DICT),
        (_replace(_FIRST, torch.zeros(32, 32, dtype=torch.complex64)), _NO_DICT),
        (_replace(_FIRST, torch.zeros(32, 32).to_sparse()), _NO_DICT),
        (_replace(_FIRST, torch.zeros(1).expand(1 << 20, 1 << 20)), _NO_DICT),
        (
            _replace("self_attn.r_proj_layer_0", torch.ones(32, 32)),
            ("*.0.self_attn.r_proj.weight",),
        ),
        (
            _replace("self_attn.q_proj_layer_2", torch.ones(32, 32)),
            ("has 0 tensors *.2.self_attn",),
        ),
        (_replace(_FIRST, torch.ones(64, 32)), (f"{_FIRST} is (64, 32), {LAYER} is (32, 32)",)),
        (_replace(_FIRST, torch.ones(0)), (f"{_FIRST} is (0,), {LAYER} is (32, 32)",)),
        (_replace(_FIRST, torch.full((32, 32), float("inf"))), (_FIRST, "infinite", "overflow")),
        (_replace(_FIRST, torch.full((32, 32), float("nan"))), (_FIRST, "NaN")),
        (_replace(_FIRST, -torch.ones(32, 32)), (_FIRST, "negative values, expected norms")),
    ],
)
def test_a_file_that_gblm_did_not_write_is_refused(
    refused: Refused,
    workplace: Path,
    tmp_path: Path,
    write: Callable[[Path], object],
    says: tuple[str, ...],
) -> None:
    """Code in it is not run; keys and shapes must be the checkpoint's, values those of norms."""
    (tmp_path / "model").symlink_to(workplace / "model")
    write(tmp_path / "file.pth")
    refused(f"{IMPORT} --l1 {tmp_path / 'file.pth'}", says=says)


def test_the_two_files_must_hold_the_same_layers(
    refused: Refused, workplace: Path, tmp_path: Path
) -> None:
    """A layer that only one of them has is named."""
    tensors = gblm_tensors(workplace / "model")
    del tensors[_FIRST]
    torch.save(tensors, tmp_path / "l2.pth")
    one, other = "l1.pth", tmp_path / "l2.pth"
    refused(f"{IMPORT} --l1 {one} --l2 {other}", says=(f"the grad_l2 file lacks {_FIRST}",))
    refused(f"{IMPORT} --l1 {other} --l2 {one}", says=(f"the grad_l1 file lacks {_FIRST}",))


@pytest.mark.parametrize(
    ("store", "says"),
    [
        ("missing", ("no store at missing",)),
        ("foreign", ("foreign is not a gradient store",)),
        ("{}/other-weights", ("other-weights is not of the same weights", "differs")),
        ("{}/no-activations", ("no-activations holds no activations", "--statistics act_l2")),
    ],
)
def test_activations_must_be_of_the_same_weights(
    refused: Refused, stores: Path, store: str, says: tuple[str, ...]
) -> None:
    """They come from a store of the very checkpoint, or not at all."""
    refused(f"{IMPORT} --l1 l1.pth --activations {store.format(stores)}", says=says)
