"""`pipe doctor`: the machine, and what a collection would make of a model."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from gradpipe import cli
from tests.support.models import save_tiny

Pipe = Callable[[str], str]


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Pipe:
    """Runs a command that must succeed, and returns what it writes to stdout."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(command: str) -> str:
        monkeypatch.setattr(sys, "argv", ["pipe", *shlex.split(command)])
        cli.app(standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_the_machine_is_described_without_a_model(pipe: Pipe) -> None:
    """Versions, devices and what is free on them."""
    found = json.loads(pipe("doctor --json -"))
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["transformers"] == transformers.__version__
    assert found["free_memory"]["cpu"] > 0
    assert found["free_disk"] > 0
    assert found["model"] is None


def test_a_model_is_described_by_its_config_alone(pipe: Pipe, tmp_path: Path) -> None:
    """Blocks, layers, dtype and schedule; the router stays dense, with the reason."""
    folder = save_tiny("mixtral", tmp_path / "mixtral")
    (folder / "model.safetensors").unlink()
    found = json.loads(pipe(f"doctor {folder} --json -"))["model"]
    assert (found["blocks"], found["num_blocks"]) == ("model.layers", 2)
    assert found["num_layers"] == 2 * (4 + 4 * 3)  # attention, and three of each expert
    attention = 32 * 32 * 2 + 16 * 32 * 2
    assert found["num_layer_weights"] == 2 * (attention + 4 * 3 * 32 * 56)
    assert (found["dtype"], found["estimate"]["schedule"]) == ("float32", "resident")
    (line,) = found["dense"]
    assert "router" in line.lower()
    assert "and 1 more, 256 weights" in line


def test_a_dry_run_says_the_same_of_layers(pipe: Pipe, tmp_path: Path) -> None:
    """The same rows in both tables."""
    folder = save_tiny("mixtral", tmp_path / "mixtral")
    tables = [
        pipe(f"doctor {folder}"),
        pipe(f"collect-grads {folder} {tmp_path / 'new'} --dry-run"),
    ]
    for row in ("blocks", "layers", "stays dense"):
        lines = [next(x for x in table.splitlines() if row in x) for table in tables]
        cells = [[cell.strip() for cell in line.split("│")] for line in lines]
        assert cells[0] == cells[1]
    assert not (tmp_path / "new").exists()
