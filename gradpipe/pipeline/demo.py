"""The main job on the embedded model: collect once, prune with every method, compare."""

from pathlib import Path
from typing import Any

from rich.console import Console

from gradpipe.errors import InputError
from gradpipe.pipeline.collect.config import CollectConfig
from gradpipe.pipeline.collect.run import collect
from gradpipe.pipeline.evaluate import evaluate_each
from gradpipe.pipeline.evaluate_config import EvalConfig
from gradpipe.pipeline.progress import QUIET
from gradpipe.pipeline.prune.config import PruneConfig
from gradpipe.pipeline.prune.run import prune
from gradpipe.pipeline.reports.results import DemoResult, PruneResult
from gradpipe.stages.checkpoint.place import EMBEDDED_NAME
from gradpipe.stages.data.config import DataConfig
from gradpipe.store.folder import is_begun, is_complete
from gradpipe.store.statistics import DEFAULT_STATISTICS, SECOND_MOMENTS

SPARSITIES = (0.5, 0.6, 0.7)
PATTERNS = ("2:4", "4:8")

ROWS: tuple[tuple[str, dict[str, Any]], ...] = (  # name, options
    ("magnitude", {"method": "magnitude"}),
    ("wanda", {"method": "wanda"}),
    ("ria", {"method": "ria"}),
    ("gradient l1", {"method": "gradient"}),
    ("gblm l1", {"method": "gblm"}),
    ("gblm l2", {"method": "gblm", "grad_norm": "l2"}),
    ("gradient-ria", {"method": "gradient-ria"}),
    ("fisher", {"method": "fisher"}),
    ("sparsegpt", {"method": "sparsegpt"}),
    ("alps", {"method": "alps"}),
    ("best", {"recipe": "best"}),
)

_SEQ_LEN = 256  # what the embedded model was trained at
_MAX_WINDOWS = 64  # 16,384 tokens: enough to tell the methods apart
_DATA = DataConfig(name="stdlib")

_EVALUATION = EvalConfig(
    model=EMBEDDED_NAME, data=_DATA, seq_len=_SEQ_LEN, batch_size=8, max_windows=_MAX_WINDOWS
)


def demo(out: Path, console: Console = QUIET) -> DemoResult:
    """Collect from the embedded model, prune it with every method, and measure all of them.

    The same call again finishes one that was interrupted. It takes a minute on two cores.

    Args:
        out: The folder to create, for the store and the checkpoints.
        console: Where progress and warnings are shown; nowhere by default.

    Returns:
        The perplexities, dense and of each method and target.

    Raises:
        InputError: If `out` exists and is not a demo's.
        GradpipeError: If the disk fails.

    Example:
        >>> from pathlib import Path
        >>> from gradpipe import demo
        >>> result = demo(Path("demo"))  # doctest: +SKIP
        >>> result.perplexities["gblm l1"]["s0.50"] > result.dense  # doctest: +SKIP
        True

    """
    store = out / "store"
    if out.exists() and not (is_begun(store) or is_complete(store)):
        raise InputError(f"OUT {out} exists: give another name")
    collect(
        CollectConfig(
            model=EMBEDDED_NAME,
            store=store,
            data=_DATA,
            seq_len=_SEQ_LEN,
            batch_size=8,
            statistics=(*DEFAULT_STATISTICS, *SECOND_MOMENTS),
        ),
        console,
    )
    results = {name: _pruned(out, name, options, console) for name, options in ROWS}
    folders = [str(result.folder) for row in results.values() for result in row]
    measured = evaluate_each([EMBEDDED_NAME, *folders], _EVALUATION, console)
    dense = next(measured).perplexity
    return DemoResult(
        folder=out,
        dense=dense,
        perplexities={
            name: {result.label: next(measured).perplexity for result in row}
            for name, row in results.items()
        },
    )


def _pruned(
    out: Path, name: str, options: dict[str, Any], console: Console
) -> tuple[PruneResult, ...]:
    """One row: all targets."""
    config = PruneConfig(
        model=EMBEDDED_NAME,
        store=str(out / "store"),
        out=out / name.replace(" ", "-"),
        sparsities=SPARSITIES,
        patterns=PATTERNS,
        overwrite=True,
        **options,
    )
    return prune(config, console)
