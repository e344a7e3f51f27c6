"""The commands of `pipe`, as typer has made them."""

from __future__ import annotations

from typing import Any

import typer

from gradpipe import cli


def _below(group: Any, words: tuple[str, ...] = ()) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        path = (*words, name)
        below = _below(command, path) if hasattr(command, "commands") else {}
        found |= below or {" ".join(path): command}
    return found


# every command that does something, by the words that call it: `eval`, `store info`
ROOT: Any = typer.main.get_command(cli.app)
COMMANDS = _below(ROOT)
FLAGS = {flag for command in COMMANDS.values() for x in command.params for flag in x.opts}
