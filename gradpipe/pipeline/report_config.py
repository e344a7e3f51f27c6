"""What a report is asked to show: options, checked alone and against each other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from gradpipe.errors import InputError
from gradpipe.options import Option, check_options, refuse_given
from gradpipe.pipeline.options import Device, Overwrite

FORMATS = ("html", "md")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """What to report of, and where to."""

    out: Annotated[
        tuple[str, ...],
        Option(help="Outputs of pipe prune, sweeps' folders, stores.", is_argument=True),
    ]
    html: Annotated[Path | None, Option(help="File to write.", default="report.html")] = None
    figures: Annotated[Path | None, Option(help="Folder for the pictures too, as SVG and PNG.")] = (
        None
    )
    format: Annotated[
        str, Option(help="{choices}: a page, or Markdown on stdout.", choices=FORMATS)
    ] = "html"
    model: Annotated[
        str | None,
        Option(
            help="The dense model, for scores, errors and outliers.",
            default="the embedded one, where it is that",
        ),
    ] = None
    layer: Annotated[
        tuple[str, ...],
        Option(
            help="Layer whose mask and scores are shown, repeatable.",
            default="the first block's key projection",
        ),
    ] = ()
    device: Device = "auto"
    overwrite: Overwrite = False

    def __post_init__(self) -> None:
        check_options(self)
        for given in self.out:
            if "://" not in given and not Path(given).is_dir():
                raise InputError(
                    f"OUT {given}: no such folder, expected what pipe prune, pipe sweep or pipe "
                    "collect-grads wrote"
                )
        if self.format != "html":
            refuse_given(self, ("html",), f"--format {self.format} is written to stdout")
