"""Commands: options that several take, and the command recorded in what it made.

Paths of outputs are left as placeholders, so that the same work gives the same bytes anywhere.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from typing import Any

from gradpipe.errors import InputError

_TOO_MANY = 2**31


def check_regexes(flag: str, patterns: tuple[str, ...]) -> None:
    """Refuse what is not a regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{flag} {pattern!r}: not a regular expression: {error}") from error


def check_counts(config: Any, least: dict[str, int]) -> None:
    """Refuse fields below their `least`, or that a store could not record; None is fine."""
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and not low <= value < _TOO_MANY:
            expected = f"at least {low}" if value < low else "less than 2³¹"
            raise InputError(f"--{name.replace('_', '-')} {value}: expected {expected}")


def recorded_command(verb: str, arguments: tuple[str, ...], options: dict[str, Any]) -> str:
    """`pipe VERB ARGUMENTS --option value …`, less options that are None, False or empty."""
    words = ["pipe", verb, *arguments]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, tuple):
            words.extend(word for item in value for word in (flag, str(item)))
        elif value is not None and value is not False:
            words.extend((flag, str(value)))
    return shlex.join(words)


def changed_options(config: Any, leave_out: set[str]) -> dict[str, Any]:
    """The fields of a config that differ from their defaults."""
    return {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if f.name not in leave_out and getattr(config, f.name) != f.default
    }
