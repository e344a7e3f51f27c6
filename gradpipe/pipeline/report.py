"""A report of outputs, sweeps and stores: found, measured, drawn, written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from rich.console import Console

from gradpipe.errors import InputError
from gradpipe.pipeline.places import REPORT, check_local, check_scratch, is_writable
from gradpipe.pipeline.progress import QUIET
from gradpipe.pipeline.report_config import ReportConfig
from gradpipe.pipeline.report_facts import measure
from gradpipe.pipeline.reports.facts import Found
from gradpipe.pipeline.reports.points import RESULTS
from gradpipe.pipeline.reports.recorded import Recorded
from gradpipe.pipeline.reports.series import Sweep
from gradpipe.stages.device import own_torch
from gradpipe.store.objects import disk_errors, write_durably
from gradpipe.store.reader import GradientStore

if TYPE_CHECKING:
    from gradpipe.pipeline.reports.document import Document

_REMEDY = "make room or give another name"


@own_torch()
def report(config: ReportConfig, console: Console = QUIET) -> str:
    """Write one page of what was pruned, swept or collected, and its pictures if asked to.

    Args:
        config: What to report of, and where to.
        console: Where progress is shown; nowhere by default.

    Returns:
        Where the page is; or the report itself, if it is asked for as Markdown.

    Raises:
        InputError: If something given is no output, sweep or store, if the page may not be written,
            or if the extra `report` is not installed.
        StoreError: If a store is damaged.
        GradpipeError: If the disk fails.

    Example:
        >>> from pathlib import Path
        >>> from gradpipe import ReportConfig, report
        >>> report(ReportConfig(out=("out", "store"), html=Path("report.html")))
        'report.html'

    """
    draw, page = _drawing()
    target = config.html or Path("report.html")
    if config.format == "html":
        _check_page(target, overwrite=config.overwrite)
    if config.figures is not None:
        _check_figures(config.figures, overwrite=config.overwrite)
    document = draw(_found(config, console))
    if config.figures is not None:
        with disk_errors(f"cannot write --figures {config.figures}", _REMEDY):
            config.figures.mkdir(parents=True, exist_ok=True)
            for picture in document.pictures:
                picture.save(config.figures)
    if config.format == "md":
        return str(page.markdown(document, config.figures))
    with disk_errors(f"cannot write --html {target}", _REMEDY):
        write_durably(target, page.html(document).encode())
    return str(target)


def _drawing() -> tuple[Callable[[Found], Document], ModuleType]:
    """What draws, and what writes; InputError without the libraries that they need."""
    try:
        from gradpipe.pipeline.reports import page  # noqa: PLC0415 (an extra)
        from gradpipe.pipeline.reports.sections import document_of  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise InputError(
            "pipe report needs matplotlib and Jinja: pip install 'gradpipe[report]'"
        ) from error
    return document_of, page


def _found(config: ReportConfig, console: Console) -> Found:
    outputs: dict[str, Recorded] = {}
    sweeps: list[Sweep] = []
    stores: dict[str, GradientStore] = {}
    for given in dict.fromkeys(config.out):
        folders = _outputs_in(given)
        outputs |= {str(folder): Recorded.read(folder) for folder in folders}
        if (Path(given) / RESULTS).is_file():
            sweeps += Sweep.read(Path(given), Path(given).resolve().name)
        elif not folders:
            stores[given] = _open_store(given)
    return Found(
        outputs=outputs,
        sweeps=tuple(sweeps),
        stores=stores,
        facts=measure(config, outputs, stores, console),
    )


def _outputs_in(given: str) -> list[Path]:
    """The checkpoints that a pruning wrote there: one, or one for each of several targets."""
    folder = Path(given)
    if (folder / REPORT).is_file():
        return [folder]
    return sorted(path.parent for path in folder.glob(f"*/{REPORT}"))


def _open_store(given: str) -> GradientStore:
    """InputError, in words of a report, for a folder that is nothing of ours."""
    is_local = "://" not in given
    if is_local and not (Path(given) / "zarr.json").is_file():
        raise InputError(
            f"OUT {given}: expected what pipe prune, pipe sweep or pipe collect-grads wrote: a "
            f"folder with {REPORT}, {RESULTS} or a store"
        )
    return GradientStore.open(given)


def _check_page(path: Path, *, overwrite: bool) -> None:
    check_local("--html", path)
    if path.is_dir() or not path.absolute().parent.is_dir() or not is_writable(path):
        raise InputError(f"--html {path}: expected a file to write, in a folder that exists")
    if path.exists() and not overwrite:
        raise InputError(f"--html {path} exists: give another name or --overwrite")


def _check_figures(folder: Path, *, overwrite: bool) -> None:
    check_scratch(folder, "--figures")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise InputError(f"--figures {folder} is not empty: give another or --overwrite")
