"""What the command writes: data on stdout, progress and errors on stderr, results as JSON.

rich is imported where a line is shown: a command that shows none does not pay for it.
"""

# ruff: noqa: PLC0415 (imports stand where they are paid for)
from __future__ import annotations

import io
import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from gradpipe.errors import GradpipeError, InputError, printable
from gradpipe.options import Option
from gradpipe.pipeline.launch import Launch

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Json = Annotated[Path | None, Option(flag="json", help="Write the result here; - for stdout.")]


def prepare_streams() -> None:
    """Let nothing be written that we did not choose, and everything that we did."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack a letter
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would tell of each retry
    if not sys.stderr.isatty():  # what the Hub's clients draw, they draw anywhere
        for library in ("HF_DATASETS", "HF_HUB"):  # read when each of them is imported
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")


def stdout() -> Console:
    """For data; of several ranks the first writes it."""
    from rich.console import Console

    return Console(
        markup=False, emoji=False, highlight=False, quiet=Launch.of(os.environ).index > 0
    )


def stderr() -> Console:
    """For progress and errors."""
    from rich.console import Console

    return Console(stderr=True, markup=False, emoji=False, highlight=False)


def say(console: Console, line: str) -> None:
    """One line, however long."""
    console.print(printable(line), soft_wrap=True)


def complain(message: str) -> None:
    """Say what went wrong."""
    say(stderr(), f"pipe: {message}")


class Output:
    """Where one result goes: a file, or `-` for stdout, as JSON; None is for people to read."""

    def __init__(self, path: Path | None) -> None:
        """InputError for a path that cannot be written to: before the work is done, not after."""
        self._path = path
        if path is None or self._is_stdout:
            return
        from gradpipe.pipeline.places import is_writable

        touched = (path, path.resolve().parent) if self._is_replaced else (path,)
        if path.is_dir() or not path.parent.is_dir() or not all(map(is_writable, touched)):
            raise InputError(
                f"--json {path}: expected - or a file that can be written, in a folder that exists"
            )

    @property
    def _is_replaced(self) -> bool:
        """False for a device or a pipe, which is written to as it is."""
        return self._path is not None and (self._path.is_file() or not self._path.exists())

    @property
    def _is_stdout(self) -> bool:
        return str(self._path) == "-"

    def show(self, document: dict[str, Any], shown: str | Table) -> None:
        """Write `document` as JSON if that was asked for; if not, or if that fails, print `shown`.

        Raises GradpipeError if it fails.
        """
        if self._path is None:
            _print(shown)
            return
        text = json.dumps(_finite(document), indent=1, allow_nan=False) + "\n"
        if self._is_stdout:
            sys.stdout.write(text)
            return
        from gradpipe.store.objects import write_durably

        try:
            if self._is_replaced:
                write_durably(self._path.resolve(), text.encode())
            else:
                self._path.write_text(text)
        except OSError as error:
            _print(shown)
            raise GradpipeError(
                f"cannot write --json {self._path}: {error.strerror}: the result is on stdout"
            ) from error


def _print(shown: str | Table) -> None:
    if isinstance(shown, str):
        for line in shown.split("\n"):
            say(stdout(), line)
    else:
        stdout().print(shown)


def _finite(value: Any) -> Any:
    """JSON has no infinity: null, where a perplexity is beyond a float."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
