"""A folder of models, texts and a store, and commands run in it that must be refused.

No test may change the folder: it is compared, file by file, before and after each command. What a
library would log counts as output.
"""

import json
import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradpipe import cli
from tests.support.models import save_tiny
from tests.support.texts import write_text

PIPE = Path(sys.executable).with_name("pipe")
LAYER = "model.layers.0.self_attn.q_proj"
KEY = f"{LAYER}.weight"
OBJECT = f"layers/{LAYER}/grad_l1/codes/c/0/0"
PLANTED = "planted"  # the file that hostile input would create if its code were run

COLLECT = "collect-grads model new --dataset text.txt --seq-len 16 --num-samples 2"
PRUNE = "prune model store new"
EVAL = "eval model --dataset text.txt --seq-len 16 --max-windows 2"
IMPORT = "store import-gblm model new"

Refused = Callable[..., str]
Pipe = Callable[[str], str]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, texts and a store that every command here may read."""
    root = tmp_path_factory.mktemp("workplace")
    save_tiny("llama", root / "model")
    save_tiny("llama", root / "other-weights", seed=1)
    save_tiny("qwen3", root / "other-shapes")
    save_tiny("gpt2", root / "other-names")
    save_tiny("llama", root / "sharded", max_shard_size="20KB")
    write_text(root / "text.txt")
    (root / "short.txt").write_text("the fox")
    (root / "foreign").mkdir()
    (root / "foreign" / "thesis.txt").write_text("years of work")
    (root / "empty").mkdir()
    torch.save(gblm_tensors(root / "model"), root / "l1.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        succeed(COLLECT.replace("new", "store") + " --statistics grad_l1,act_l2", patch)
    return root


@pytest.fixture(scope="session")
def stores(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores that lack something: activations, and the model's own weights."""
    root = tmp_path_factory.mktemp("stores")
    collect = COLLECT.replace("new", f"{root}/{{}}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        succeed(collect.format("no-activations") + " --statistics grad_l1", patch)
        of_another = collect.replace("model", "other-weights", 1).format("other-weights")
        succeed(of_another + " --statistics act_l2", patch)
    return root


@pytest.fixture
def refused(
    workplace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Refused:
    """Runs a command in the workplace that must fail cleanly, and returns its one line."""
    monkeypatch.chdir(workplace)
    _as_users_see_it(monkeypatch)

    def run(command: str, *arguments: object, code: int = 2, says: tuple[str, ...] = ()) -> str:
        capsys.readouterr()  # of what had to succeed before
        before = contents(workplace, tmp_path)
        got = run_pipe(monkeypatch, *shlex.split(command), *arguments)
        out, err = capsys.readouterr()
        assert got == code, err
        assert err.startswith("pipe: ")
        assert err.count("\n") == 1, err
        assert out == ""
        after = contents(workplace, tmp_path)
        assert after.keys() == before.keys()
        assert after == before
        for words in says:
            assert words in err
        return err

    return run


@pytest.fixture
def pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Pipe:
    """Runs a command that must succeed, in a folder with a model and a text; gives its stdout.

    Nothing may reach stderr: it is no terminal here.
    """
    save_tiny("llama", tmp_path / "model")
    write_text(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    _as_users_see_it(monkeypatch)

    def run(command: str) -> str:
        capsys.readouterr()
        code = run_pipe(monkeypatch, *shlex.split(command))
        out, err = capsys.readouterr()
        said = [line for line in err.splitlines() if not line.startswith("schedule ")]
        assert (code, said) == (0, [])
        return out

    return run


def _as_users_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without colours, and with what libraries log on the stderr that is looked at."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    for library in ("transformers", "datasets", "huggingface_hub"):
        for handler in logging.getLogger(library).handlers:
            if type(handler) is logging.StreamHandler:  # its own, not one that pytest has added
                monkeypatch.setattr(handler, "stream", sys.stderr)


def run_pipe(patch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of a command run in this process."""
    patch.setattr(sys, "argv", ["pipe", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def succeed(command: str, patch: pytest.MonkeyPatch) -> None:
    """Run a command that must not fail."""
    assert run_pipe(patch, *shlex.split(command)) == 0


def contents(*folders: Path) -> dict[str, tuple[int, ...]]:
    """What would differ had any file or folder below these been made, lost or written to."""
    return {
        path: (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        for folder in folders
        for root, folders_in, files_in in os.walk(folder)
        for path in (f"{root}/{name}" for name in (*folders_in, *files_in))
        for stat in [Path(path).lstat()]
    }


def gblm_tensors(model: Path) -> dict[str, Any]:
    """Tensors under the keys, and of the shapes and type, of the reference's files."""
    tensors = {}
    for key, weight in load_file(model / "model.safetensors").items():
        if key.startswith("model.layers.") and weight.ndim == 2:
            block, module = key.removeprefix("model.layers.").split(".", 1)
            tensors[f"{module.removesuffix('.weight')}_layer_{block}"] = weight.abs().half()
    return tensors


class Hostile:
    """Creates a file where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def edit_config(model: Path, **changes: object) -> None:
    """Change fields of `config.json`; None takes one away."""
    path = model / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(model: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of the one safetensors file."""
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
