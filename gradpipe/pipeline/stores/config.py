"""What is to be done with a finished store: the options of `pipe store copy` and its kin."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from gradpipe.options import Option, check_options, refuse_given
from gradpipe.store.statistics import STATISTICS

IMATRIX, SAFETENSORS = "imatrix", "safetensors"
FORMATS = (IMATRIX, SAFETENSORS)
Store = Annotated[str, Option(help="Path or URL.", is_argument=True)]
Layer = Annotated[str | None, Option(help="Regex on layer names: these alone.", is_regex=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyConfig:
    """Which store to copy, and where to."""

    source: Annotated[str, Option(flag="src", help="Store: a path or a URL.", is_argument=True)]
    destination: Annotated[
        str,
        Option(
            flag="dst",
            help="A folder to create, s3://…, gs://… or hf://datasets/OWNER/NAME.",
            is_argument=True,
        ),
    ]
    private: Annotated[bool, Option(help="On the Hub: let nobody else read it.")] = False

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """Which statistics to write for other tools, and in which of their formats."""

    store: Store
    out: Annotated[Path, Option(help="File to create.", is_argument=True)]
    format: Annotated[str, Option(help="{choices}.", choices=FORMATS)]
    statistics: Annotated[
        tuple[str, ...],
        Option(
            help="{choices}; comma-separated.",
            choices=STATISTICS,
            default="all of the store",
            separator=",",
        ),
    ] = ()
    layer: Layer = None

    def __post_init__(self) -> None:
        check_options(self)
        if self.format == IMATRIX:
            refuse_given(self, ("statistics",), "an importance matrix is of act_l2")


@dataclass(frozen=True, slots=True, kw_only=True)
class StatsConfig:
    """Which layers of a store to describe."""

    store: Store
    layer: Layer = None

    def __post_init__(self) -> None:
        check_options(self)
