"""The errors that gradpipe raises on purpose.

Every message is one line: what was given, what was expected, what to do. The library raises,
the command line alone turns a class into an exit code (`gradpipe.cli`).
"""

import difflib
import re
import textwrap
from collections.abc import Iterable

_CREDENTIALS = re.compile(
    r"""(?<=://)[^/\s@'"]+(?=@)          # of a URL: name:password@
    | (?<=\?)[^\s'"]{16,}              # what a signed URL is signed with
    | \bhf_[A-Za-z0-9]{30,}            # a token of the Hub
    | (?<=Bearer\ )\S+
    | (?i:(?<=secret=)|(?<=token=)|(?<=password=))[^\s&,)'"]+""",
    re.VERBOSE,
)

# What reading a JSON document may raise whose contents are others; an infinite count overflows.
ODD_DOCUMENT = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


class GradpipeError(Exception):
    """Something went wrong that gradpipe can name: a full disk, a model that yields NaN."""

    is_told = False  # another rank says it


class InputError(GradpipeError):
    """The user's mistake: an option, a path or a file that cannot be what was meant."""


class StoreError(GradpipeError):
    """A gradient store that is incomplete, damaged, or not a gradient store at all."""


class Interrupted(GradpipeError):  # noqa: N818 (what happened, not what went wrong)
    """A signal asked to stop; what was done is saved, and the same command goes on from it."""


def printable(text: str) -> str:
    """`text` less what a terminal would obey, or could not show."""
    return "".join(char if char.isprintable() else " " for char in text)


def without_credentials(text: str) -> str:
    """`text` less what would let a reader of it in: passwords in URLs, signatures, tokens."""
    return _CREDENTIALS.sub("…", text)


def one_line(error: BaseException) -> str:
    """What another library's error says, on one line of bounded length; its class if nothing."""
    said = without_credentials(str(error))
    return textwrap.shorten(said, 400, placeholder=" …") or type(error).__name__


def class_and_line(error: BaseException) -> str:
    """An error's class and the first line of what it says: a model's code writes paragraphs."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`: did you mean gblm?`, of the known name that is nearest; nothing if none is near."""
    near = difflib.get_close_matches(given[:200], [x for x in known if x != given], n=1)
    return f": did you mean {near[0]}?" if near else ""


def steps_of(names: Iterable[str]) -> set[str]:
    """What a pattern may have meant of dotted names: `mlp.up_proj`, and each step of it."""
    steps = [name.split(".") for name in names]
    return {step for some in steps for step in some} | {".".join(some[-2:]) for some in steps}
