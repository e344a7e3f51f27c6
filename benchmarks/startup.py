"""What a command costs before it does anything: CPU seconds, against its libraries alone.

    python benchmarks/startup.py                             # about a minute

Each side is a process of its own, the least of several in turns. The least that a command line can
take is what imports typer and rich, that of a command on a store what imports zarr.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer

from benchmarks.measures import Measure, measures_table
from benchmarks.random_llama import LlamaSize, heading, write_checkpoint, write_store

LIBRARIES: Final = {"cli": "import typer, rich", "store": "import zarr"}
TINY: Final = LlamaSize(hidden=32, blocks=1, intermediate=64, heads=2, vocab=300)
REMOVED: Final = "{store}-that-is-not-there"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command, what it is held against, and the exit code that it must have."""

    words: str
    against: str
    goal: float
    before: str
    code: int = 0


COMMANDS: Final = (
    Command(words="--help", against="cli", goal=4, before="90 ×"),
    Command(words="prune --help", against="cli", goal=4, before="90 ×"),
    Command(words="store info {store}", against="store", goal=2, before="18 ×"),
    Command(
        words="prune {model} {store} out --no-such", against="store", goal=2, before="18 ×", code=2
    ),
    Command(words=f"prune {{model}} {REMOVED} out", against="store", goal=2, before="18 ×", code=2),
)


def cpu_seconds(command: list[str], code: int = 0) -> float:
    """User and system seconds of a process; ValueError for another exit code."""
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = os.times()
    if done.returncode != code:
        raise ValueError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr}")
    return (
        after.children_user - before.children_user + after.children_system - before.children_system
    )


def least(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The least of each side; the sides take turns, once more to warm the page cache."""
    taken = [{name: side() for name, side in sides.items()} for _ in range(repeats + 1)]
    return {name: min(turn[name] for turn in taken[1:]) for name in sides}


def measure(repeats: int, folder: Path) -> Iterator[Measure]:
    """Each command ÷ its libraries."""
    model, store = folder / "model", folder / "store"
    write_checkpoint(model, TINY)
    write_store(model, store)
    sides: dict[str, Callable[[], float]] = {
        name: partial(cpu_seconds, [sys.executable, "-c", text]) for name, text in LIBRARIES.items()
    }
    for command in COMMANDS:
        words = command.words.format(model=model, store=store).split()
        call = [sys.executable, "-m", "gradpipe", *words]
        sides[command.words] = partial(cpu_seconds, call, command.code)
    found = least(sides, repeats)
    for command in COMMANDS:
        shown = command.words.format(model="MODEL", store="STORE")
        yield Measure(
            name=f"`pipe {shown}` ÷ `{LIBRARIES[command.against]}`",
            value=found[command.words] / found[command.against],
            unit="×",
            goal=command.goal,
            before=command.before,
        )


def main(repeats: Annotated[int, typer.Option(min=1)] = 5) -> None:
    """Compare commands with the libraries that they need; print a table."""
    with tempfile.TemporaryDirectory() as folder:
        measures = list(measure(repeats, Path(folder)))
    print(heading("Start-up"), measures_table(measures), sep="\n")


if __name__ == "__main__":
    typer.run(main)
