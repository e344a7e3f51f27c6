"""Run every study of `pipe sweep` on models that need no download, and keep what it finds.

    python scripts/studies.py WORK
    python scripts/studies.py WORK alpha owl

The results go to `docs/studies/NAME/results.jsonl`, with a page that has the table, its
command and a picture.
WORK keeps stores, and the small image classifier that the study of images is run on. What is done
is not done again: to run a study anew, remove its results.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from gradpipe import CollectConfig, DataConfig, SweepConfig, collect, sweep
from gradpipe.pipeline.reports import figures
from gradpipe.pipeline.reports.points import sweep_table
from gradpipe.pipeline.reports.series import Sweep
from gradpipe.pipeline.studies import STUDIES, Study

ROOT: Final = Path(__file__).parents[1]
PAGES: Final = ROOT / "docs" / "studies"
STATISTICS: Final = ("grad_l1", "grad_l2", "grad_sum", "act_l2", "hessian")
SAMPLES: Final = (1, 8, 32, 128)  # the last store is the one of most studies
TEXT: Final = DataConfig(name="stdlib")
CLASSIFIER: Final = ("--hidden", "32", "--blocks", "2", "--steps", "300")


def main(
    work: Annotated[Path, typer.Argument(help="Folder for stores and models.")],
    names: Annotated[list[str] | None, typer.Argument(help="Which; all, if none.")] = None,
) -> None:
    """One after the other."""
    work.mkdir(parents=True, exist_ok=True)
    for name in names or STUDIES:
        study = STUDIES[name]
        stores = [
            collected(work, count) for count in (SAMPLES if study.needs_stores else SAMPLES[-1:])
        ]
        config = of_images(work) if name == "vit" else of_text(stores)
        config = replace(config, study=name, out=PAGES / name)
        write_page(study, config)


def collected(work: Path, count: int) -> Path:
    """The embedded model's store of so many samples."""
    store = work / f"store-{count}"
    config = CollectConfig(
        model="embedded",
        store=store,
        data=TEXT,
        num_samples=count,
        seq_len=256,
        batch_size=8,
        statistics=STATISTICS,
    )
    collect(config)
    return store


def of_text(stores: list[Path]) -> SweepConfig:
    """The embedded model on its own held-out text."""
    return SweepConfig(
        model="embedded",
        store=str(stores[0]),
        with_stores=tuple(map(str, stores[1:])),
        out=PAGES,
        data=TEXT,
        seq_len=256,
        max_windows=16,
        batch_size=8,
    )


def of_images(work: Path) -> SweepConfig:
    """A ViT trained for a minute, on images that it has not seen."""
    shapes, store = work / "shapes", work / "shapes-store"
    if not (shapes / "model").exists():
        script = ROOT / "scripts" / "train_tiny_vit.py"
        subprocess.run([sys.executable, script, shapes, *CLASSIFIER], check=True)
    images = DataConfig(name=str(shapes / "calibration"))
    model = str(shapes / "model")
    collect(CollectConfig(model=model, store=store, data=images, num_samples=128, batch_size=32))
    heldout = DataConfig(name=str(shapes / "heldout"))
    return SweepConfig(model=model, store=str(store), out=PAGES, data=heldout, batch_size=100)


def write_page(study: Study, config: SweepConfig) -> None:
    """Run a study, and write its page."""
    results = sweep(config, Console(stderr=True))
    console = Console(file=StringIO(), width=1000)
    console.print(sweep_table(results, study.x, plain=True))
    assert isinstance(console.file, StringIO)
    table = "\n".join(x for x in console.file.getvalue().splitlines() if x.strip())
    note = f"Reconstructed: {study.reconstructed}.\n\n" if study.reconstructed else ""
    [found] = Sweep.read(config.out, str(config.study))
    picture = figures.sweep(found, "picture")
    picture.save(config.out, ("svg",))
    (config.out / "table.md").write_text(
        f"# {study.title}\n\n```console\n$ {command(config)}\n```\n\n{note}{table}\n\n"
        f"![{picture.title}](picture.svg)\n",
        encoding="utf-8",
    )


def command(config: SweepConfig) -> str:
    """As the command line has it, from within WORK."""
    options: dict[str, Any] = {
        "--study": config.study,
        "--dataset": _short(config.data.name),
        "--seq-len": config.seq_len,
        "--max-windows": config.max_windows,
        "--batch-size": config.batch_size,
    }
    words = ["pipe", "sweep", _short(config.model), _short(config.store), str(config.study)]
    words += [x for store in config.with_stores for x in ("--with-store", _short(store))]
    for flag, value in options.items():
        words += [] if value is None else [flag, str(value)]
    return shlex.join(words)


def _short(path: str) -> str:
    """A path below WORK."""
    parts = Path(path).parts
    return "/".join(parts[-2:]) if "shapes" in parts else parts[-1]


if __name__ == "__main__":
    typer.run(main)
