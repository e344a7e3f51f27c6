"""What the command shows: results and failures, on streams that lack letters, of odd names."""

import io
import json
import logging
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers.utils import logging as hf_logging

from gradpipe import GradientStore, GradpipeError, cli
from gradpipe.pipeline import compare as comparing
from gradpipe.stages.collect.streamed import Streamed
from gradpipe.stages.device import is_out_of_memory, memory_errors
from tests.support.phases import PHASES
from tests.support.workplace import COLLECT, EVAL, edit_weights

Ran = tuple[int, str, str]  # exit code, stdout, stderr
Run = Callable[[str], Ran]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in an empty folder, whatever becomes of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def call(command: str) -> Ran:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["pipe", *shlex.split(command)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        code = stopped.value.code
        assert isinstance(code, int)
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def place(workplace: Path, tmp_path: Path) -> Path:
    """A folder with the model, the text and the store, to be changed at will."""
    for name in ("model", "store"):
        shutil.copytree(workplace / name, tmp_path / name)
    shutil.copy(workplace / "text.txt", tmp_path)
    return tmp_path


def test_a_result_that_cannot_be_kept_is_shown(run: Run, place: Path) -> None:
    """A disk that fills up in the meantime does not take the perplexity with it."""
    del place
    code, out, err = run(f"{EVAL} --json /dev/full")
    assert code == 1
    assert out.startswith("perplexity ")
    assert err.startswith("pipe: cannot write --json /dev/full: No space left on device: the")


def test_an_interrupted_run_leaves_the_earlier_result(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is written whole beside, and renamed; links are followed."""
    (place / "result.json").write_text("{}")
    (place / "link.json").symlink_to("result.json")

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stopped)
        assert run("store info store --json link.json")[0] == 75
    assert (place / "result.json").read_text() == "{}"
    names = {path.name for path in place.iterdir()}
    assert run("store info store --json link.json") == (0, "", "")
    assert {path.name for path in place.iterdir()} == names
    assert json.loads((place / "result.json").read_text())["digest"]
    assert (place / "link.json").is_symlink()


@pytest.mark.parametrize("device", ["/dev/null", "/dev/stderr"])
def test_a_device_is_written_to_and_not_replaced(run: Run, place: Path, device: str) -> None:
    """A result may be thrown away, or be sent where only the shell knows."""
    del place
    before = Path(device).stat()
    assert run(f"store info store --json {device}")[0] == 0
    assert os.path.samestat(Path(device).stat(), before)


def test_statistics_may_be_given_one_by_one(run: Run, place: Path) -> None:
    """Repeated or separated by commas: none is dropped."""
    options = "--statistics grad_l1,act_sum --statistics act_l2"
    assert run(f"{COLLECT} {options}")[0] == 0
    spec = GradientStore.open(str(place / "new")).spec
    assert set(spec.statistics) == {"grad_l1", "act_sum", "act_l2"}


def test_the_version_is_told(run: Run) -> None:
    """On stdout, and nothing else."""
    code, out, err = run("--version")
    assert (code, err) == (0, "")
    assert out.startswith("pipe ")


# ---- a model that overflows ----


def _scale_head(place: Path, factor: float) -> None:
    edit_weights(place / "model", lambda x: x["lm_head.weight"].mul_(factor))


@pytest.mark.parametrize("json_file", ["", "--json -", "--json result.json"])
def test_a_model_that_yields_nan_has_no_perplexity(run: Run, place: Path, json_file: str) -> None:
    """It is a failure, not `inf` with exit code 0."""
    _scale_head(place, math.nan)
    code, out, err = run(f"{EVAL} {json_file}")
    assert (code, out) == (1, "")
    assert err.startswith("pipe: the model's loss is nan on window 1 of 2: try --dtype")
    assert not Path("result.json").exists()


def test_a_perplexity_beyond_floats_is_null(run: Run, place: Path) -> None:
    """JSON knows no infinity; the line says inf."""
    _scale_head(place, 1e6)
    code, out, _ = run(f"{EVAL} --json -")

    def refuse(name: str) -> float:
        raise AssertionError(name)

    assert code == 0
    assert json.loads(out, parse_constant=refuse)["perplexity"] is None
    assert run(EVAL)[1].startswith("perplexity inf ")


# ---- no memory left ----


def _allocate(*_: object, **__: object) -> Any:
    return torch.empty(1 << 55)  # torch's own error, on a CPU


@pytest.mark.parametrize(
    ("command", "place_of_it", "says"),
    [
        (f"{COLLECT} --schedule resident", PHASES["accumulating"], "--schedule streamed"),
        (f"{COLLECT} --schedule streamed", (Streamed, "run"), "--overwrite a smaller --batch-size"),
        (EVAL, (comparing, "perplexity"), "a smaller --batch-size or --seq-len"),
    ],
)
def test_memory_that_runs_out_is_a_line(
    run: Run,
    place: Path,
    command: str,
    place_of_it: tuple[Any, str],
    says: str,
) -> None:
    """With the options that need less of it."""
    del place
    with mock.patch.object(*place_of_it, _allocate):
        code, out, err = run(command)
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("pipe: out of memory: ")
    assert says in last


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_memory_has_several_errors(error: Exception) -> None:
    """Torch's for a GPU, and Python's; another RuntimeError stays what it is."""
    assert is_out_of_memory(error)
    with pytest.raises(GradpipeError, match="out of memory: less"), memory_errors("less"):
        raise error
    with pytest.raises(RuntimeError, match="shapes"), memory_errors("less"):
        raise RuntimeError("shapes differ")


# ---- names that a terminal would misread ----


def test_brackets_and_colons_in_names_are_no_markup(run: Run, place: Path) -> None:
    """`[/b]` is no end of bold, `:warning:` no picture, wherever a name is shown."""
    odd = Path("[red] :warning: [") / "b]"  # which is `[/b]` in a path
    odd.mkdir(parents=True)
    (place / "model").rename(odd / "model")
    (place / "text.txt").rename(odd / "[red] :warning: [b].txt")
    text = shlex.quote(f"{odd}/[red] :warning: [b].txt")
    model, store, out = (shlex.quote(f"{odd}/{x}") for x in ("model", "store", "out"))
    options = f"--dataset {text} --seq-len 16"
    shown = []
    for command in (
        f"collect-grads {model} {store} {options} --num-samples 2",
        f"store info {store}",
        f"store verify {store}",
        f"prune {model} {store} {out} --include mlp",
        f"eval {model} {options} --max-windows 2",
    ):
        code, stdout, err = run(command)
        assert code == 0, err
        shown.append(" ".join(stdout.split()))
    measured = shown.pop()  # which says the last part of a path
    assert all("[red] :warning: [/b]" in x for x in shown), shown
    assert "[red] :warning: [b].txt" in measured
    code, _, err = run(f"prune {model} {store} {out}")
    assert (code, f"OUT {odd}/out exists" in err) == (2, True)


def test_a_terminal_that_lacks_letters_is_written_to(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ASCII has not is spelled out, in data as in errors."""
    (place / "text.txt").rename("téxt.txt")
    command = EVAL.replace("text.txt", "téxt.txt")
    for arguments, expected in ((command, 0), (f"{command} --split é", 2)):
        written = io.BytesIO()
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(written, encoding="ascii"))
        code, _, _ = run(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        assert code == expected
        assert b"t\\xe9xt.txt" in written.getvalue()


# ---- what libraries would log ----


def test_gpt2_is_measured_without_a_notice(
    run: Run, workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Transformers has no name for its loss, takes the right one, and would say so."""
    hf_logging.warning_once.cache_clear()
    command = EVAL.replace("text.txt", str(workplace / "text.txt"))
    hf_logging.enable_propagation()
    try:
        code, _, err = run(command.replace("model", str(workplace / "other-names")))
    finally:
        hf_logging.disable_propagation()
    assert (code, err, caplog.messages) == (0, "", [])


def test_what_the_hub_s_client_tries_again_is_not_told(run: Run) -> None:
    """What fails in the end is an error of ours, in one line."""
    run("--version")
    assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)
