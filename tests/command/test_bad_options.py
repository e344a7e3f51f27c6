"""Options and names that cannot be meant: each is named, with what it may be."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from gradpipe import cli
from tests.support.workplace import (
    COLLECT,
    EVAL,
    IMPORT,
    LAYER,
    PIPE,
    PRUNE,
    Refused,
    contents,
    edit_config,
)


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
        (f"{PRUNE} --group rows", ("group 'rows'", "output, input, layer, global, output:K")),
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
        (f"{COLLECT} --recipe bset", ("--recipe bset", "expected one of best")),
        (f"{PRUNE} --recipe bset", ("--recipe bset", "expected one of best")),
        (f"{PRUNE} --score 'abs(W'", ("--score", "abs(W")),
        (f"{PRUNE} --score ''", ("--score ''", "give one, or leave it out")),
        (f"{PRUNE} --exclude ''", ("--exclude ''", "give one, or leave it out")),
        (f"{COLLECT} --include ''", ("--include ''", "give one, or leave it out")),
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
        (f"{PRUNE} --sparsity 50%", ("--sparsity 50%", "[0, 1)", "as 0.5")),
        (f"{PRUNE} --sparsity half", ("--sparsity half", "[0, 1)")),
        (f"{PRUNE} --sparsity 0.5,0.6", ("--sparsity 0.5,0.6", "repeat --sparsity")),
        (f"{COLLECT} --num-samples 2147483648", ("--num-samples 2147483648", "less than 2³¹")),
        (f"{COLLECT} --num-samples 2147483647", ("of 16 tokens", "ask for fewer")),
        (f"{COLLECT} --batch-size 9999999999999999999", ("--batch-size 9", "less than 2³¹")),
        (f"{COLLECT} --seq-len 9999999999", ("--seq-len 9999999999", "less than 2³¹")),
        (f"{EVAL} --batch-size 9999999999", ("--batch-size 9999999999", "less than 2³¹")),
        (f"{IMPORT} --l1 l1.pth --num-samples 2147483648", ("--num-samples", "less than 2³¹")),
        (f"{COLLECT} --text-column body", ("--text-column body", "--dataset text.txt does not")),
        (
            "eval model --dataset stdlib --text-column body",
            ("--text-column body", "--dataset stdlib does not"),
        ),
        (f"{COLLECT} --scratch text.txt", ("--scratch text.txt", "expected a folder")),
        (f"{COLLECT} --scratch text.txt/x", ("--scratch text.txt/x", "text.txt is a file")),
        (
            f"{COLLECT} --statistics grad_l1 --statistics act_l2,grad_l1",
            ("'grad_l1,act_l2,grad_l1'", "different names"),
        ),
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


def test_nobody_meant_what_is_not_here(refused: Refused) -> None:
    """A device that is right, and absent, is not suggested."""
    if not torch.cuda.is_available():
        line = refused(f"{COLLECT} --device cuda", says=("--device cuda", "no such device here"))
        assert "did you mean" not in line


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


@pytest.mark.parametrize(
    "command",
    [
        "collect-grads {} new --dataset text.txt --seq-len 16",
        "collect-grads model {} --dataset text.txt --seq-len 16",
        "collect-grads model new --dataset {} --seq-len 16",
        "collect-grads model new --dataset text.txt --seq-len 16 --scratch {}",
        "prune {} store new",
        "prune model {} new",
        "prune model store {}",
        "eval {} --dataset text.txt",
        "eval model --dataset {} --seq-len 16",
        "eval model --dataset text.txt --seq-len 16 --json {}",
        "store info {}",
    ],
)
@pytest.mark.parametrize("length", [300, 5000])
def test_a_name_that_no_file_can_have_is_refused(
    refused: Refused, command: str, length: int
) -> None:
    """Whatever it was meant to name, in one line that is not as long itself."""
    line = refused(command.format("x" * length))
    assert len(line) < length + 500


def test_names_leave_room_for_locks_beside_them(refused: Refused) -> None:
    """A folder's name may be long, but what is written beside it is longer."""
    refused(PRUNE.replace("new", "x" * 201), says=("a name of 201 bytes", "at most 200"))


def test_a_store_is_not_made_behind_a_broken_link(refused: Refused, tmp_path: Path) -> None:
    """A link to nothing may have been meant for a disk that is not mounted."""
    (tmp_path / "link").symlink_to("nowhere")
    refused(COLLECT.replace("new", str(tmp_path / "link")), says=("is a link to nothing",))


@pytest.mark.parametrize("command", [EVAL, "store info store"])
def test_a_json_file_that_cannot_be_written_is_refused_at_once(
    refused: Refused, command: str
) -> None:
    """Before the work, not after."""
    with mock.patch.object(os, "access", return_value=False):
        refused(f"{command} --json result.json", says=("--json result.json", "can be written"))


def test_a_scratch_folder_that_cannot_be_made_is_refused(refused: Refused) -> None:
    """Before the store is begun."""
    with mock.patch.object(os, "access", return_value=False):
        refused(f"{COLLECT} --scratch tmp/x", says=("--scratch tmp/x", "can be created"))


# ---- what a launcher says ----


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, ("MASTER_ADDR", "start the command with torchrun")),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ("RANK 2, WORLD_SIZE 2", "expected ranks from 0")),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"},
            ("LOCAL_WORLD_SIZE 0", "expected ranks from 0"),
        ),
    ],
)
def test_an_environment_of_ranks_that_makes_no_sense_is_refused(
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    says: tuple[str, ...],
) -> None:
    """Left over from another program, say: what is set, and what to do."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused("prune model store new", says=says)


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
