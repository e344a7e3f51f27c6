"""What pruning costs, by every method: perplexity on held-out text, statistics of the dense model.

    python benchmarks/quality.py                                     # the embedded model
    python benchmarks/quality.py --model DIR --calibration IDS.npy --heldout IDS.npy
    python benchmarks/quality.py --sequential                        # what dense statistics cost

One store, collected once; one row for each method, update and allocation, one column for each
target. `--sequential` prunes by the recipe block by block, each block's statistics collected on
the blocks before it as already pruned, and prints that beside the recipe itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from benchmarks.random_llama import heading, table
from gradpipe import (
    CollectConfig,
    DataConfig,
    EvalConfig,
    PruneConfig,
    collect,
    evaluate,
    open_store,
    prune,
)
from gradpipe.pipeline.evaluate import evaluate_each
from gradpipe.pipeline.recipes import RECIPES

SPARSITIES: Final = (0.5, 0.6, 0.7)
PATTERNS: Final = ("2:4", "4:8")
STATISTICS: Final = ("grad_l1", "grad_l2", "grad_sum", "act_l2", "hessian", "grad_cov")
_RECIPE: Final = RECIPES["best"]
BEST_UNIFORM: Final[dict[str, Any]] = {"method": _RECIPE.method, "curvature": _RECIPE.curvature}
ROWS: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("magnitude, layer", {"method": "magnitude", "group": "layer"}),
    ("wanda", {"method": "wanda"}),
    ("ria", {"method": "ria"}),
    ("gradient-ria", {"method": "gradient-ria"}),
    ("gradient l1", {"method": "gradient"}),
    ("gblm l1", {"method": "gblm"}),
    ("gblm l2", {"method": "gblm", "grad_norm": "l2"}),
    ("gblm sum", {"method": "gblm", "grad_norm": "sum"}),
    ("fisher", {"method": "fisher"}),
    ("fisher, global", {"method": "fisher", "group": "global"}),
    ("sparsegpt", {"method": "sparsegpt"}),
    ("wanda + owl", {"method": "wanda", "allocation": "owl"}),
    ("wanda + dlp", {"method": "wanda", "allocation": "dlp"}),
    ("sparsegpt + owl", {"method": "sparsegpt", "allocation": "owl"}),
    ("sparsegpt + sensitivity", {"method": "sparsegpt", "allocation": "sensitivity"}),
    ("wanda + obs", {"method": "wanda", "update": "obs"}),
    ("wanda + lsq", {"method": "wanda", "update": "lsq"}),
    ("gblm l2 + obs", {"method": "gblm", "grad_norm": "l2", "update": "obs"}),
    ("gblm l2 + lsq", {"method": "gblm", "grad_norm": "l2", "update": "lsq"}),
    (
        "gblm l2 + lsq, kfac",
        {"method": "gblm", "grad_norm": "l2", "update": "lsq", "curvature": "kfac"},
    ),
    ("alps", {"method": "alps"}),
    ("alps, kfac, output", {"method": "alps", "curvature": "kfac", "group": "output"}),
    ("alps, kfac", {"method": "alps", "curvature": "kfac"}),
    ("alps, kfac + owl", {"method": "alps", "curvature": "kfac", "allocation": "owl"}),
    ("--recipe best", {"recipe": "best"}),
)

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One model, its texts, and a folder to work in."""

    model: str
    calibration: str
    heldout: str
    seq_len: int
    folder: Path

    @property
    def evaluation(self) -> EvalConfig:
        """How every checkpoint is measured."""
        data = DataConfig(name=self.heldout)
        return EvalConfig(model=self.model, data=data, seq_len=self.seq_len, batch_size=8)

    def collect(self, model: str, store: Path, statistics: tuple[str, ...]) -> None:
        """Stage one."""
        collect(
            CollectConfig(
                model=model,
                store=store,
                data=DataConfig(name=self.calibration),
                seq_len=self.seq_len,
                batch_size=8,
                overwrite=True,
                statistics=statistics,
            )
        )

    def row(self, options: dict[str, Any]) -> Iterator[float]:
        """Perplexities of one row, by target; NaN where a row has no patterns."""
        unstructured_only = "global" in options.values()
        out = self.folder / "out"
        config = PruneConfig(
            model=self.model,
            store=str(self.folder / "store"),
            out=out,
            sparsities=SPARSITIES,
            patterns=() if "group" in options else PATTERNS,
            overwrite=True,
            **options,
        )
        folders = [str(result.folder) for result in prune(config)]
        if "group" in options and not unstructured_only:
            rest = {k: v for k, v in options.items() if k != "group"}
            patterns = PruneConfig(
                model=self.model,
                store=str(self.folder / "store"),
                out=self.folder / "out-patterns",
                patterns=PATTERNS,
                overwrite=True,
                **rest,
            )
            folders += [str(result.folder) for result in prune(patterns)]
        for metrics in evaluate_each(folders, self.evaluation):
            yield metrics.perplexity

    def sequential(self, target: dict[str, Any]) -> float:
        """The recipe with each block's statistics taken on pruned inputs; one target."""
        current = self.model
        store = open_store(self.folder / "store")
        blocks = sorted({x.block for x in store.spec.layers if x.block is not None})
        for block in blocks:
            again = self.folder / f"sequential-{block}"
            out = self.folder / f"sequential-out-{block}"
            self.collect(current, again, ("hessian", "grad_cov"))
            names = "|".join(x.name for x in store.spec.layers if x.block == block)
            prune(
                PruneConfig(
                    model=current,
                    store=str(again),
                    out=out,
                    include=(f"^({names})$",),
                    overwrite=True,
                    **target,
                    **BEST_UNIFORM,
                )
            )
            current = str(out)
        config = EvalConfig(
            model=current, data=DataConfig(name=self.heldout), seq_len=self.seq_len, batch_size=8
        )
        return evaluate(config).perplexity


def targets() -> list[tuple[str, dict[str, Any]]]:
    """Columns, and the options of each alone."""
    unstructured = [(f"{round(100 * s)} %", {"sparsities": (s,)}) for s in SPARSITIES]
    return [*unstructured, *((p, {"patterns": (p,)}) for p in PATTERNS)]


@app.command()
def main(
    model: str = "embedded",
    calibration: str = "stdlib",
    heldout: str = "stdlib",
    seq_len: int = 256,
    rows: Annotated[str, typer.Option(help="Only the rows whose name holds this.")] = "",
    sequential: Annotated[bool, typer.Option("--sequential")] = False,  # noqa: FBT002
) -> None:
    """Print one table of perplexities."""
    print(heading("What pruning costs"))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            model=model,
            calibration=calibration,
            heldout=heldout,
            seq_len=seq_len,
            folder=Path(folder),
        )
        dense = evaluate(bench.evaluation)
        bench.collect(model, bench.folder / "store", STATISTICS)
        print(f"{model}: dense {dense.perplexity:.2f} on {dense.num_tokens:,} held-out tokens.\n")
        lines = []
        if sequential:
            values = [bench.sequential(target) for _, target in targets()]
            lines.append(["best, uniform, sequential", *(f"{x:.2f}" for x in values)])
            chosen = [("best, uniform", BEST_UNIFORM)]
        else:
            chosen = [(name, options) for name, options in ROWS if rows in name]
        for name, options in chosen:
            values = list(bench.row(options))
            blanks = ["–"] * (len(targets()) - len(values))
            lines.append([name, *(f"{x:.2f}" for x in values), *blanks])
            print(name, *lines[-1][1:], flush=True)
        print()
        print(table(["method", *(name for name, _ in targets())], lines))


if __name__ == "__main__":
    app()
