"""What is to be done with a finished store: the options of `pipe store copy` and its kin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from gradpipe.options import Option, check_options


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyConfig:
    """Which store to copy, and where to."""

    source: Annotated[
        str, Option(flag="src", help="Store: a path or a URL.", is_argument=True, is_recorded=False)
    ]
    destination: Annotated[
        str,
        Option(
            flag="dst",
            help="A folder to create, s3://…, gs://… or hf://datasets/OWNER/NAME.",
            is_argument=True,
            is_recorded=False,
        ),
    ]
    private: Annotated[
        bool, Option(help="On the Hub: let nobody else read it.", is_recorded=False)
    ] = False

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check_options(self)
