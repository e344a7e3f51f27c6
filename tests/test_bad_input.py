"""What cannot be meant, or is damaged, is refused: one line that says so, and nothing left behind.

Nearly every test runs `pipe` in this process, in a folder of models, texts and a store that no
test may change: it is compared, file by file, before and after each command. What a library
would log counts as output.
"""

import gzip
import json
import pickle
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from safetensors.torch import load_file

from gradpipe import cli
from tests.texts import SENTENCE
from tests.workplace import (
    COLLECT,
    EVAL,
    IMPORT,
    KEY,
    LAYER,
    OBJECT,
    PIPE,
    PLANTED,
    PRUNE,
    Hostile,
    Refused,
    contents,
    edit_config,
    edit_weights,
    gblm_tensors,
    succeed,
)

# ---- options ----


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (f"{COLLECT} --statistics grad_l3", ("--statistics 'grad_l3'", "grad_l1, grad_l2")),
        (f"{COLLECT} --statistics ''", ("--statistics ''", "act_l2")),
        (f"{COLLECT} --statistics grad_l1,grad_l1", ("'grad_l1,grad_l1'", "different")),
        (f"{COLLECT} --encoding int8", ("--encoding int8", "float32, float16")),
        (f"{COLLECT} --dtype int8", ("--dtype int8", "float32, bfloat16, float16")),
        (f"{COLLECT} --device tpu", ("--device tpu", "auto, cpu or cuda")),
        (f"{COLLECT} --device cuda:99", ("--device cuda:99", "auto, cpu or cuda")),
        (f"{COLLECT} --device meta", ("--device meta", "auto, cpu or cuda")),
        (f"{COLLECT} --num-samples 0", ("--num-samples 0", "at least 1")),
        (f"{COLLECT} --batch-size 0", ("--batch-size 0", "at least 1")),
        (f"{COLLECT} --seq-len 1", ("--seq-len 1", "at least 2")),
        (f"{COLLECT} --seq-len 65", ("--seq-len 65", "model has 64 positions")),
        (f"{COLLECT} --blocks model.blocks", ("--blocks model.blocks", "has model.layers")),
        (f"{COLLECT} --include '('", ("--include '('", "not a regular expression")),
        (f"{COLLECT} --include lm_haed", ("--include lm_haed", "has lm_head")),
        (f"{PRUNE} --method gblmm", ("--method gblmm", "magnitude, wanda, gradient, gblm")),
        (f"{PRUNE} --method 'a\nb'", ("--method a b: expected",)),
        (f"{PRUNE} --method :warning:", ("--method :warning:: expected",)),
        (f"{PRUNE} --grad-norm l3", ("--grad-norm l3", "l1, l2, sum")),
        (f"{PRUNE} --alpha nan", ("--alpha nan", "finite")),
        (f"{PRUNE} --alpha=-1", ("--alpha -1", "0 or more")),
        (f"{PRUNE} --group rows", ("group 'rows'", "output, input, layer, output:K")),
        (f"{PRUNE} --group output:0", ("group 'output:0'", "output:K")),
        (f"{PRUNE} --device tpu", ("--device tpu", "auto, cpu or cuda")),
        (f"{PRUNE} --sparsity 1.0", ("--sparsity 1.0", "[0, 1)")),
        (f"{PRUNE} --sparsity 50", ("--sparsity 50", "[0, 1)")),
        (f"{PRUNE} --sparsity=-0.1", ("--sparsity -0.1", "[0, 1)")),
        (f"{PRUNE} --sparsity nan", ("--sparsity nan", "[0, 1)")),
        (f"{PRUNE} --sparsity 0.5 --sparsity 0.50", ("s0.50 is given twice", "leave one out")),
        (f"{PRUNE} --pattern 2:4 --pattern 2:4", ("2-4 is given twice", "leave one out")),
        (f"{PRUNE} --pattern 2-4", ("pattern '2-4'", "such as 2:4")),
        (f"{PRUNE} --pattern {'9' * 5000}:4", ("pattern", "such as 2:4")),
        (f"{PRUNE} --pattern 4:2", ("pattern 4:2", "n ≤ m")),
        (f"{PRUNE} --pattern 0:0", ("pattern 0:0", "n ≥ 1")),
        (f"{PRUNE} --pattern 0:4", ("pattern 0:4", "n ≥ 1")),
        (f"{PRUNE} --pattern 2:5", (f"pattern 2:5: layer {LAYER} has 32", "--exclude")),
        (f"{PRUNE} --pattern 2:4 --group layer", ("--group layer", "leave it out")),
        (f"{PRUNE} --include '('", ("--include '('", "not a regular expression")),
        (f"{PRUNE} --exclude '['", ("--exclude '['", "not a regular expression")),
        (f"{COLLECT} --split test", ("--split test", "--dataset text.txt does not")),
        (f"{COLLECT} --revision main", ("--revision main", "--dataset text.txt does not")),
        (f"{EVAL} --dataset-config en", ("--dataset-config en", "--dataset text.txt does not")),
        ("eval model --dataset stdlib --split test", ("--split test", "--dataset stdlib does not")),
        (f"{COLLECT} --recipe bset", ("--recipe bset", "expected best")),
        (f"{PRUNE} --recipe bset", ("--recipe bset", "expected best")),
        (f"{PRUNE} --score 'abs(W'", ("--score", "abs(W")),
        (f"{PRUNE} --score '__import__(\"os\")'", ("--score", "__import__")),
        (f"{PRUNE} --method alps --score W", ("--score: alps has no score",)),
        (f"{PRUNE} --score 'W*ri(X)'", ("--score 'W*ri(X)'", "ri() is of a matrix")),
        (f"{PRUNE} --score 'abs(W)' --method wanda", ("--score", "leave out --method wanda")),
        (f"{PRUNE} --method wanda --alpha 5", ("--alpha 5.0", "wanda has none")),
        (f"{PRUNE} --method fisher --grad-norm l2", ("--grad-norm l2", "fisher does not use it")),
        (f"{PRUNE} --method alps --grad-norm l2", ("--grad-norm l2", "alps does not use it")),
        (f"{PRUNE} --allocation global", ("--allocation global", "--group global")),
        (f"{PRUNE} --exclude layernorm", ("--exclude layernorm", "matches no layer of model")),
        (f"{PRUNE} --update osb", ("--update osb", "none, obs, lsq")),
        (f"{PRUNE} --method sparsegpt --update obs", ("--update obs", "updates weights by itself")),
        (f"{PRUNE} --curvature kfak", ("--curvature kfak", "input, kfac")),
        (f"{PRUNE} --curvature kfac", ("--curvature kfac", "only --update lsq and alps")),
        (f"{PRUNE} --allocation owls", ("--allocation owls", "uniform, owl, dlp, sensitivity")),
        (f"{PRUNE} --allocation-score wanda", ("--allocation-score", "uses none")),
        (f"{PRUNE} --mixed-patterns", ("--mixed-patterns", "--pattern and an --allocation")),
        (f"{PRUNE} --include nothing", ("--include nothing", "matches no layer of model")),
        (f"{PRUNE} --exclude dwon_proj", ("--exclude dwon_proj", "matches no layer of model")),
        (f"{PRUNE} --include mlp --exclude mlp", ("no layer is left", "check --include")),
        (f"{PRUNE} --exclude .", ("no layer is left", "check --include and --exclude")),
        (f"{EVAL} --seq-len 1", ("--seq-len 1", "at least 2")),
        (f"{EVAL} --seq-len 65", ("--seq-len 65", "model has 64 positions")),
        (f"{EVAL} --max-windows 0", ("--max-windows 0", "at least 1")),
        (f"{EVAL} --batch-size 0", ("--batch-size 0", "at least 1")),
        (f"{EVAL} --dtype int8", ("--dtype int8", "float32, bfloat16, float16")),
        (f"{EVAL} --device tpu", ("--device tpu", "auto, cpu or cuda")),
        (f"{EVAL} --json no/such/folder.json", ("--json no/such/folder.json", "folder that")),
        (f"{EVAL} --json model", ("--json model", "expected - or a file")),
        ("store info store --json model", ("--json model", "expected - or a file")),
        (IMPORT, ("nothing to import", "--l1 FILE, --l2 FILE or both")),
        (f"{IMPORT} --l1 l1.pth --num-samples 0", ("--num-samples 0", "at least 1")),
        (f"{IMPORT} --l1 l1.pth --scale nan", ("--scale nan", "more than 0")),
    ],
)
def test_an_option_that_cannot_be_meant_is_named(
    refused: Refused, command: str, says: tuple[str, ...]
) -> None:
    """The line gives the option, what it got, and what it may be."""
    refused(command, says=says)


@pytest.mark.parametrize(
    "command",
    ["collect-grads model", "prune model store", "eval", f"{EVAL} --seq-len many", "sweeep", "--x"],
)
def test_what_is_no_command_exits_2_as_well(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Missing arguments and unknown options are the parser's to explain, with the same code."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", ["pipe", *shlex.split(command)])
    before = contents(workplace)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert contents(workplace) == before


# ---- models ----


@pytest.mark.parametrize(
    "command",
    [
        "collect-grads {} new --dataset text.txt --seq-len 16",
        "prune {} store new",
        "eval {} --dataset text.txt --seq-len 16",
        "store import-gblm {} new --l1 l1.pth",
    ],
)
def test_a_model_path_must_be_one(refused: Refused, command: str) -> None:
    """A missing path, a file, and a folder without `config.json` are told apart."""
    refused(command.format("missing"), says=("missing is neither a model directory nor a Hub id",))
    refused(command.format("text.txt"), says=("text.txt is a file, expected a model directory",))
    refused(command.format("foreign"), says=("foreign is not a model directory", "config.json"))


def _lose_a_shard(model: Path) -> None:
    (model / "model-00002-of-00006.safetensors").unlink()


def _point_outside(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"][KEY] = "../model/model.safetensors"
    index.write_text(json.dumps(document))


def _swap_two_shards(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    files = sorted(set(document["weight_map"].values()))
    document["weight_map"][KEY] = next(f for f in files if f != document["weight_map"][KEY])
    index.write_text(json.dumps(document))


def _empty_the_index(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text("{}")


def _garble_the_index(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text('{"weight_map": ')


@pytest.mark.parametrize("command", [COLLECT, PRUNE, EVAL])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_lose_a_shard, ("lacks 1 of", "model-00002-of-00006.safetensors", "fetch it")),
        (_point_outside, ("names a file outside", "../model/model.safetensors")),
        (_swap_two_shards, (KEY, "does not hold it")),
        (_empty_the_index, ("model.safetensors.index.json", "no weight_map", "restore")),
        (_garble_the_index, ("model.safetensors.index.json", "cannot read")),
    ],
)
def test_shards_must_be_as_the_index_says(
    refused: Refused,
    workplace: Path,
    tmp_path: Path,
    command: str,
    damage: Callable[[Path], None],
    says: tuple[str, ...],
) -> None:
    """A shard that is missing, elsewhere or another one is found before anything is computed."""
    shutil.copytree(workplace / "sharded", tmp_path / "model")
    damage(tmp_path / "model")
    refused(command.replace("model", str(tmp_path / "model"), 1), says=says)


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.0001, 0.01, 0.5, 0.999])
def test_a_truncated_safetensors_file_is_named(
    refused: Refused, workplace: Path, tmp_path: Path, share: float
) -> None:
    """Wherever it ends, in its length, its header or its data, the file is not used."""
    shutil.copytree(workplace / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(share * len(data))])
    for command in (COLLECT, PRUNE, EVAL):
        refused(
            command.replace("model", str(tmp_path / "model"), 1),
            says=(f"{weights} is not a whole safetensors file", "fetch it again"),
        )


def test_the_hostile_pickle_would_work(tmp_path: Path) -> None:
    """What the next tests plant does create its file where pickle is trusted."""
    pickle.loads(pickle.dumps(Hostile(tmp_path / PLANTED)))  # noqa: S301 (that is the point)
    assert (tmp_path / PLANTED).exists()


@pytest.mark.parametrize("command", [COLLECT, PRUNE, EVAL])
def test_a_pickled_checkpoint_is_refused_unread(
    refused: Refused, workplace: Path, tmp_path: Path, command: str
) -> None:
    """Nothing in it is run, and the line says how to convert it."""
    model = tmp_path / "model"
    shutil.copytree(workplace / "model", model)
    (model / "model.safetensors").unlink()
    torch.save({"weight": Hostile(tmp_path / PLANTED)}, model / "pytorch_model.bin")
    refused(
        command.replace("model", str(model), 1),
        says=("as pickle (pytorch_model.bin)", "can run code", "save_pretrained"),
    )


def test_a_model_s_own_code_is_never_run(refused: Refused, workplace: Path, tmp_path: Path) -> None:
    """Without a question on stdout either, which a script would wait for."""
    model = tmp_path / "model"
    shutil.copytree(workplace / "model", model)
    classes = {"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.A"}
    edit_config(model, model_type="evil", auto_map=classes)
    (model / "evil.py").write_text(f"open({str(tmp_path / PLANTED)!r}, 'w')\nclass A: pass\n")
    for command in (COLLECT, EVAL):
        refused(command.replace("model", str(model), 1), says=("custom code",))


def _drop(key: str) -> Callable[[Path], None]:
    return lambda model: edit_weights(model, lambda tensors: tensors.pop(key))


def _configure(**changes: object) -> Callable[[Path], None]:
    return lambda model: edit_config(model, **changes)


def _shrink_the_vocabulary(model: Path) -> None:
    keys = ("model.embed_tokens.weight", "lm_head.weight")
    edit_weights(model, lambda t: t.update({k: t[k][:40].clone() for k in keys}))
    edit_config(model, vocab_size=40)


def _garble_the_config(model: Path) -> None:
    (model / "config.json").write_text("{")


@pytest.mark.parametrize("command", [COLLECT, EVAL])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_garble_the_config, ("cannot read", "config.json")),
        (_configure(model_type=None), ("cannot read its config.json", "model_type")),
        (_configure(model_type="nonesuch"), ("cannot read its config.json", "nonesuch")),
        (_configure(hidden_size="wide"), ("cannot read its config.json", "'hidden_size'", "wide")),
        (_configure(model_type="t5"), ("as a causal language model", "T5Config")),
        (_configure(hidden_size=64), ("(96, 32), by its config.json (96, 64)",)),
        (_configure(num_hidden_layers=3), ("lacks 9 tensors", "model.layers.2.", "fetch it")),
        (_drop("model.norm.weight"), ("lacks 1 tensors", "model.norm.weight", "fetch it")),
        (_drop(KEY), ("lacks 1 tensors", KEY, "fetch it")),
        (_shrink_the_vocabulary, ("the text holds token", "has 40", "belongs to another model")),
    ],
)
def test_a_model_that_transformers_would_make_up_or_choke_on_is_refused(
    refused: Refused,
    workplace: Path,
    tmp_path: Path,
    command: str,
    damage: Callable[[Path], None],
    says: tuple[str, ...],
) -> None:
    """Missing weights are not drawn at random, and config, weights and tokenizer must agree."""
    shutil.copytree(workplace / "model", tmp_path / "model")
    damage(tmp_path / "model")
    refused(command.replace("model", str(tmp_path / "model"), 1), says=says)


def test_an_odd_list_of_architectures_is_no_reason_to_fail(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The field is recorded, not used."""
    shutil.copytree(workplace / "model", tmp_path / "model")
    shutil.copy(workplace / "text.txt", tmp_path)
    edit_config(tmp_path / "model", architectures=5)
    monkeypatch.chdir(tmp_path)
    succeed(f"{COLLECT} --statistics act_l2", monkeypatch)


# ---- texts ----


def _parquet(path: Path, **columns: list[object]) -> None:
    pq.write_table(pa.table(columns), path)


def _write(data: bytes | str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data if isinstance(data, bytes) else data.encode())


def _truncated_parquet(path: Path) -> None:
    _parquet(path, text=[SENTENCE] * 20)
    path.write_bytes(path.read_bytes()[:-10])


def _array(values: np.ndarray) -> Callable[[Path], object]:
    return lambda path: np.save(path, values)


def _pickled_array(path: Path) -> None:
    np.save(path, np.array([{"not": "tokens"}], dtype=object), allow_pickle=True)


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


# ---- destinations ----


@pytest.mark.parametrize("command", [COLLECT, f"{IMPORT} --l1 l1.pth"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("store", ("store store exists and is complete", "another name or --overwrite")),
        ("foreign", ("store foreign holds files of another kind", "another name")),
        ("foreign --overwrite", ("store foreign holds files of another kind", "another name")),
        ("model --overwrite", ("store model holds model, which is read", "another name")),
        ("text.txt", ("store text.txt is a file", "a folder to create")),
        ("text.txt --overwrite", ("store text.txt is a file", "a folder to create")),
        ("text.txt/store", ("text.txt is a file", "expected a folder")),
        ("s3://bucket/store", ("is a URL", "expected a local folder")),
    ],
)
def test_a_store_replaces_nothing_but_a_store(
    refused: Refused, command: str, options: str, says: tuple[str, ...]
) -> None:
    """And a store only with --overwrite."""
    refused(command.replace("new", options, 1), says=says)


def test_another_zarr_group_is_not_an_unfinished_store(refused: Refused, tmp_path: Path) -> None:
    """Somebody's own Zarr data, and what only has the name of metadata, stay."""
    zarr.create_group(str(tmp_path / "group")).create_array("a", shape=(2,), dtype="f4")
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "zarr.json").write_text("junk")
    for name in ("group", "junk"):
        command = COLLECT.replace("new", str(tmp_path / name)) + " --overwrite"
        refused(command, says=(f"store {tmp_path / name} holds files of another kind",))


def test_a_store_never_replaces_what_it_is_made_from(
    refused: Refused, workplace: Path, tmp_path: Path
) -> None:
    """A model, a text, gradients or activations inside the store to be replaced are not lost."""
    store = tmp_path / "store"
    shutil.copytree(workplace / "store", store)
    shutil.copytree(workplace / "model", store / "model")
    shutil.copy(workplace / "text.txt", store)
    shutil.copy(workplace / "l1.pth", store)
    collect = COLLECT.replace("new", str(store)) + " --overwrite"
    bring_in = IMPORT.replace("new", str(store)) + " --overwrite --l1"
    refused(collect.replace("model", str(store / "model"), 1), says=(f"holds {store / 'model'}",))
    refused(collect, "--dataset", store / "text.txt", says=(f"holds {store / 'text.txt'}",))
    refused(bring_in, store / "l1.pth", says=(f"holds {store / 'l1.pth'}",))
    for url in (store, f"file://{store}"):
        refused(bring_in, "l1.pth", "--activations", url, says=(f"holds {store}",))


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("foreign", ("OUT foreign exists", "another name or --overwrite")),
        ("empty", ("OUT empty exists", "another name or --overwrite")),
        ("text.txt", ("OUT text.txt exists", "another name or --overwrite")),
        ("text.txt --overwrite", ("OUT text.txt is a file", "a folder to create or replace")),
        ("foreign --overwrite", ("OUT foreign holds files that no pruning wrote", "another name")),
        ("text.txt/new", ("text.txt is a file", "expected a folder")),
        ("s3://bucket/new", ("is a URL", "expected a local folder")),
    ],
)
def test_an_output_that_exists_is_kept(refused: Refused, out: str, says: tuple[str, ...]) -> None:
    """Nothing is replaced unasked, and nothing but a folder ever is."""
    refused(PRUNE.replace("new", out), says=says)


@pytest.mark.parametrize("store", ["store", "{}/store", "file://{}/store"])
@pytest.mark.parametrize(
    "out",
    ["model", "model/new", "model/../model", "store", "store/new", "store/layers", ".", "..", "/"],
)
def test_an_output_never_touches_what_it_is_made_from(
    refused: Refused, workplace: Path, store: str, out: str
) -> None:
    """OUT as model or store, in one or around one: refused, also with --overwrite."""
    store = store.format(workplace)
    refused(f"prune model {store} {out} --overwrite", says=(f"OUT {Path(out)} and", "another OUT"))


def test_a_link_to_the_model_is_the_model(
    refused: Refused, workplace: Path, tmp_path: Path
) -> None:
    """Another name for the same folder does not get it replaced."""
    (tmp_path / "link").symlink_to(workplace / "model")
    refused(PRUNE.replace("new", str(tmp_path / "link")), "--overwrite", says=("another OUT",))


# ---- stores that do not fit ----


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("other-names", ("store is of another model (model)", f"other-names has no {KEY}")),
        ("other-shapes", (f"layer {LAYER} is (32, 32) there, (64, 32) in other-shapes",)),
        ("other-weights", ("layer model.layers.0.", "collect again, or --allow-mismatch")),
    ],
)
def test_a_store_of_another_model_is_refused(
    refused: Refused, model: str, says: tuple[str, ...]
) -> None:
    """By the names of its layers, by their shapes, and by the bytes of their weights."""
    refused(f"prune {model} store new", says=says)
    refused(f"prune {model} store new/in/folders", says=says)


def test_a_mismatch_that_is_allowed_is_recorded(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pruning.json` names the layers that were not measured, and gives the command."""
    monkeypatch.chdir(workplace)
    for model, mismatched in (("other-weights", 14), ("model", 0)):
        out = tmp_path / model
        succeed(f"prune {model} store {out} --allow-mismatch", monkeypatch)
        report = json.loads((out / "pruning.json").read_text())
        assert len(report["mismatched_layers"]) == mismatched
        assert set(report["mismatched_layers"]) <= set(report["layers"])
        assert "--allow-mismatch" in report["command"]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (
            "prune model store new --grad-norm l2",
            ("store store lacks grad_l2", "gblm", "--statistics grad_l1,act_l2,grad_l2"),
        ),
        (
            "prune model {}/no-activations new --method wanda",
            ("lacks act_l2", "wanda needs", "--statistics grad_l1,act_l2"),
        ),
        (
            "prune model store new --include lm_head",
            ("lacks grad_l1 of layer lm_head", "--statistics grad_l1,act_l2 --include lm_head"),
        ),
    ],
)
def test_a_statistic_that_is_missing_is_asked_for_by_its_flag(
    refused: Refused, stores: Path, command: str, says: tuple[str, ...]
) -> None:
    """The line holds the options that would have collected it."""
    refused(command.format(stores), says=says)


@pytest.mark.parametrize("command", ["store info {}", "store verify {}", "prune model {} new"])
def test_what_is_no_store_is_told_from_a_damaged_one(refused: Refused, command: str) -> None:
    """Nothing there, a folder of other files, a file, or a URL of no known kind: exit 2."""
    refused(command.format("missing"), says=("no store at missing", "collect-grads"))
    for name in ("empty", "foreign", "model", "text.txt"):
        refused(command.format(name), says=(f"{name} is not a gradient store", "commit.json"))
    refused(command.format("nonesuch://x"), says=("cannot open store nonesuch://x",))


# ---- damaged stores ----


@pytest.mark.parametrize("command", ["store info {}", "store verify {}", "prune model {} new"])
def test_a_store_without_its_commit_record_is_incomplete(
    refused: Refused, workplace: Path, tmp_path: Path, command: str
) -> None:
    """However much of it is there; the line says which command finishes it."""
    store = tmp_path / "store"
    shutil.copytree(workplace / "store", store)
    (store / "commit.json").unlink()
    says = (f"store {store} is incomplete", "no commit.json", "collect-grads again")
    refused(command.format(store), code=3, says=says)


def _flip(share: float) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(share * (len(data) - 1))] ^= 1
        path.write_bytes(data)

    return flip


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


_DAMAGES = [_flip(0), _flip(0.5), _flip(1), _halve, _lengthen, _write("")]


@pytest.mark.parametrize(
    "damage", _DAMAGES, ids=["first", "middle", "last", "halved", "longer", "empty"]
)
@pytest.mark.parametrize(
    "key", ["zarr.json", "commit.json", f"layers/{LAYER}/grad_l1/codes/zarr.json", OBJECT]
)
def test_a_damaged_object_is_named(
    refused: Refused,
    workplace: Path,
    tmp_path: Path,
    key: str,
    damage: Callable[[Path], object],
) -> None:
    """A bit, the end, all of it: verifying and pruning exit 3, and no output is left."""
    store = tmp_path / "store"
    shutil.copytree(workplace / "store", store)
    damage(store / key)
    for command in ("store verify {}", "prune model {} new", "prune model {} new/in/folders"):
        refused(command.format(store), code=3, says=(f"store {store}: object {key} is damaged",))


@pytest.mark.parametrize("key", ["zarr.json", f"layers/{LAYER}/act_l2/zarr.json", OBJECT])
def test_a_deleted_object_is_named(
    refused: Refused, workplace: Path, tmp_path: Path, key: str
) -> None:
    """A chunk that is gone would read as zeros without an error: here it is one."""
    store = tmp_path / "store"
    shutil.copytree(workplace / "store", store)
    (store / key).unlink()
    for command in ("store verify {}", "prune model {} new"):
        refused(command.format(store), code=3, says=(f"object {key} is missing", "restore"))


@pytest.mark.parametrize(
    "key", ["calibration/input_ids/c/0/0", "calibration/sources/zarr.json", "layers/zarr.json"]
)
def test_verify_reads_also_what_pruning_does_not(
    refused: Refused, workplace: Path, tmp_path: Path, key: str
) -> None:
    """Every object is checked, whoever needs it."""
    for name, damage in (("flipped", _flip(0.5)), ("deleted", Path.unlink)):
        shutil.copytree(workplace / "store", tmp_path / name)
        damage(tmp_path / name / key)
        refused("store verify", tmp_path / name, code=3, says=(f"object {key} is",))


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


# ---- as a process of its own ----


@pytest.mark.parametrize("fault", ["model", "shapes"])
def test_the_installed_command_fails_as_cleanly(
    workplace: Path, tmp_path: Path, fault: str
) -> None:
    """Where libraries write to the real stderr, there is still one line, and it is ours."""
    shutil.copytree(workplace / "model", tmp_path / "model")
    shutil.copy(workplace / "text.txt", tmp_path)
    if fault == "model":
        (tmp_path / "model" / "config.json").unlink()
    else:
        edit_config(tmp_path / "model", hidden_size=64)
    before = contents(tmp_path)
    done = subprocess.run(
        [PIPE, *shlex.split(EVAL)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("pipe: model")
    assert done.stderr.count("\n") == 1
    assert contents(tmp_path) == before
