"""The errors that gradpipe raises on purpose.

Every message is one line: what was given, what was expected, what to do. The library raises,
the command line alone turns a class into an exit code (`gradpipe.cli`).
"""

from __future__ import annotations


class GradpipeError(Exception):
    """Something went wrong that gradpipe can name: a full disk, a model that yields NaN."""


class InputError(GradpipeError):
    """The user's mistake: an option, a path or a file that cannot be what was meant."""


class StoreError(GradpipeError):
    """A gradient store that is incomplete, damaged, or not a gradient store at all."""
