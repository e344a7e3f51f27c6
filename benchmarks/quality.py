r"""What pruning costs, by every method: perplexity, and nats lost to the dense model.

    python benchmarks/quality.py                                     # the embedded model
    python benchmarks/quality.py --model DIR --calibration IDS.npy --heldout IDS.npy
    python benchmarks/quality.py … --sequential sparsegpt,alps       # measured block by block

The protocol of a real model (64 x 512 tokens to calibrate, in float32; 40 windows of 512 held out,
in bfloat16):

    python benchmarks/quality.py --model DIR --calibration calibration_ids.npy --num-samples 64 \
        --heldout heldout_ids.npy --seq-len 512 --dtype bfloat16 --targets 0.5,0.6,0.7,2:4 \
        --results quality.json --work FOLDER

One store, collected once; one row for each method, update and allocation, one column for each
target. `--sequential` prunes block by block, each block's statistics collected on the blocks
before it as already pruned, which is how SparseGPT and Wanda were published. Results are written
as they come: the same command, killed or not, goes on after those that it finds, with the same
`--work` also from the block that it was at.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from benchmarks.random_llama import heading, table
from gradpipe import CollectConfig, DataConfig, EvalConfig, PruneConfig, collect, open_store, prune
from gradpipe.errors import GradpipeError
from gradpipe.pipeline.evaluate import evaluate_each
from gradpipe.pipeline.recipes import RECIPES
from gradpipe.store.lock import locked

TARGETS: Final = "0.5,0.6,0.7,2:4,4:8"
STATISTICS: Final = ("grad_l1", "grad_l2", "grad_sum", "act_l2", "hessian", "grad_cov")
DENSE: Final = "dense"
BASELINE: Final = "sparsegpt, sequential"  # what others are held against
_RECIPE: Final = RECIPES["best"]
SEQUENTIAL: Final[Mapping[str, tuple[dict[str, Any], tuple[str, ...]]]] = {  # options, statistics
    "wanda": ({"method": "wanda"}, ("act_l2",)),
    "sparsegpt": ({"method": "sparsegpt"}, ("hessian",)),
    "alps": (
        {"method": _RECIPE.method, "curvature": _RECIPE.curvature},
        ("hessian", "grad_cov"),
    ),
}  # the last is the recipe less its allocation, which looks at all blocks
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """What all results of one file share."""

    model: str
    calibration: str
    heldout: str
    seq_len: int
    num_samples: int
    dtype: str  # that held-out text is measured in
    collect_dtype: str

    @property
    def evaluation(self) -> EvalConfig:
        """How every checkpoint is measured."""
        return EvalConfig(
            model=self.model,
            data=DataConfig(name=self.heldout),
            seq_len=self.seq_len,
            batch_size=8,
            dtype=self.dtype,
        )

    def collect(
        self, model: str, store: Path, statistics: tuple[str, ...], exclude: tuple[str, ...] = ()
    ) -> None:
        """Stage one, or the rest of it."""
        config = CollectConfig(
            model=model,
            store=store,
            data=DataConfig(name=self.calibration),
            num_samples=self.num_samples,
            seq_len=self.seq_len,
            batch_size=8,
            statistics=statistics,
            exclude=exclude,
            dtype=self.collect_dtype,
        )
        collect(config)

    def told(self) -> dict[str, Any]:
        """For a file: names without folders, so that it says nothing of the machine."""
        named = {x: Path(getattr(self, x)).name for x in ("model", "calibration", "heldout")}
        return named | {
            x: getattr(self, x) for x in ("seq_len", "num_samples", "dtype", "collect_dtype")
        }


@dataclass(slots=True)
class Results:
    """Perplexities by row and target, in a file if there is one; written as they come."""

    path: Path | None
    protocol: dict[str, Any]
    rows: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Go on with the file; ValueError if it is of another protocol."""
        if self.path is None or not self.path.exists():
            return
        found = json.loads(self.path.read_text())
        if found["protocol"] != self.protocol:
            raise ValueError(f"{self.path} is of {found['protocol']}: expected {self.protocol}")
        self.rows = found["rows"]

    def lacking(self, row: str, targets: Sequence[str]) -> list[str]:
        """The targets that a row has no result for."""
        return [x for x in targets if x not in self.rows.get(row, {})]

    def add(self, row: str, target: str, perplexity: float) -> None:
        """Keep a result."""
        self.rows.setdefault(row, {})[target] = perplexity
        print(f"{row}, {target}: {perplexity:.2f}", flush=True)
        if self.path is not None:
            document = {"protocol": self.protocol, "rows": self.rows}
            beside = self.path.with_suffix(".partial")
            beside.write_text(json.dumps(document, indent=1) + "\n")
            beside.replace(self.path)

    def tables(self, targets: Sequence[str]) -> Iterator[str]:
        """Perplexities; nats lost to the dense model; shares less lost than the baseline."""
        header = ["method", *(_title(x) for x in targets)]
        pruned = {row: of for row, of in self.rows.items() if row != DENSE}
        yield table(
            header,
            [[row, *(_cell(of.get(x), "{:.2f}") for x in targets)] for row, of in pruned.items()],
        )
        lost = {row: {x: self._lost(of, x) for x in targets} for row, of in pruned.items()}
        yield table(
            header, [[row, *(_cell(of[x], "{:.3f}") for x in targets)] for row, of in lost.items()]
        )
        if base := lost.pop(BASELINE, None):
            shares = {row: {x: _less(of[x], base[x]) for x in targets} for row, of in lost.items()}
            header[0] = f"less lost than {BASELINE}, %"
            yield table(
                header,
                [[row, *(_cell(of[x], "{:.0f}") for x in targets)] for row, of in shares.items()],
            )

    def _lost(self, row: Mapping[str, float], target: str) -> float | None:
        if target not in row:
            return None
        return math.log(row[target]) - math.log(self.rows[DENSE][DENSE])


def _less(lost: float | None, base: float | None) -> float | None:
    return None if lost is None or not base else 100 * (1 - lost / base)


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _title(target: str) -> str:
    return target if ":" in target else f"{100 * float(target):g} %"


def _regex(names: Iterable[str]) -> str:
    """What matches these names alone."""
    return f"^({'|'.join(map(re.escape, names))})$"


def _target_options(targets: Sequence[str]) -> dict[str, Any]:
    """As `prune` is given them."""
    return {
        "sparsities": tuple(float(x) for x in targets if ":" not in x),
        "patterns": tuple(x for x in targets if ":" in x),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A protocol, its results, and a folder to work in."""

    protocol: Protocol
    results: Results
    folder: Path

    def dense(self) -> None:
        """The unpruned model."""
        if self.results.lacking(DENSE, [DENSE]):
            [metrics] = evaluate_each([self.protocol.model], self.protocol.evaluation)
            self.results.add(DENSE, DENSE, metrics.perplexity)

    def row(self, name: str, options: Mapping[str, Any], targets: Sequence[str]) -> None:
        """One row from the one store: what is lacking, pruned in one pass.

        A group is of sparsities alone: patterns compare within their own, and one threshold for all
        layers has none.
        """
        lacking = self.results.lacking(name, targets)
        patterns = [x for x in lacking if ":" in x] if "group" in options else []
        together = [x for x in lacking if x not in patterns]
        self._prune(name, options, together)
        if options.get("group") != "global":
            rest = {key: value for key, value in options.items() if key != "group"}
            self._prune(name, rest, patterns)

    def _prune(self, name: str, options: Mapping[str, Any], targets: Sequence[str]) -> None:
        if not targets:
            return
        config = PruneConfig(
            model=self.protocol.model,
            store=str(self.folder / "store"),
            out=self.folder / "out",
            overwrite=True,
            **_target_options(targets),
            **options,
        )
        folders = [str(result.folder) for result in prune(config)]
        ordered = [*(x for x in targets if ":" not in x), *(x for x in targets if ":" in x)]
        measured = evaluate_each(folders, self.protocol.evaluation)
        for target, metrics in zip(ordered, measured, strict=True):
            self.results.add(name, target, metrics.perplexity)

    def sequential(self, name: str, target: str) -> None:
        """One target, each block measured behind pruned ones; those that are there stay."""
        options, statistics = SEQUENTIAL[name]
        row = f"{name}, sequential"
        if not self.results.lacking(row, [target]):
            return
        current = self.protocol.model
        layers = open_store(self.folder / "store").spec.layers
        for block in sorted({x.block for x in layers if x.block is not None}):
            names = _regex(x.name for x in layers if x.block == block)
            here = self.folder / f"{name}-{target.replace(':', '-')}-{block}"
            if not (here / "out").exists():
                others = [x.name for x in layers if x.block != block]
                exclude = (_regex(others),) if others else ()
                self.protocol.collect(current, here / "store", statistics, exclude)
                config = PruneConfig(
                    model=current,
                    store=str(here / "store"),
                    out=here / "out",
                    include=(names,),
                    **_target_options([target]),
                    **options,
                )
                prune(config)
            current = str(here / "out")
        [metrics] = evaluate_each([current], self.protocol.evaluation)
        self.results.add(row, target, metrics.perplexity)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Keep a second run from a folder or a file: it would read what this one has half written."""
    with ExitStack() as held:
        try:
            held.enter_context(locked(path.with_name(f".{path.name}.lock"), of=path, wait=False))
        except GradpipeError as error:
            raise SystemExit(f"quality.py: {error}") from error
        yield


def main(  # noqa: PLR0913, PLR0917 - one parameter per option
    model: str = "embedded",
    calibration: str = "stdlib",
    heldout: str = "stdlib",
    seq_len: int = 256,
    num_samples: Annotated[int, typer.Option(help="Windows to calibrate on.")] = 128,
    dtype: Annotated[str, typer.Option(help="To measure in.")] = "auto",
    collect_dtype: str = "float32",
    targets: str = TARGETS,
    rows: Annotated[str, typer.Option(help="Only the rows whose name holds this.")] = "",
    sequential: Annotated[str, typer.Option(help=f"Of {', '.join(SEQUENTIAL)}.")] = "",
    results: Annotated[Path | None, typer.Option(help="A JSON file, begun or to begin.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder for stores and checkpoints.")] = None,
) -> None:
    """Measure what is lacking; print tables of all that there is."""
    protocol = Protocol(
        model=model,
        calibration=calibration,
        heldout=heldout,
        seq_len=seq_len,
        num_samples=num_samples,
        dtype=dtype,
        collect_dtype=collect_dtype,
    )
    wanted = targets.split(",")
    with ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for path in (folder, results):
            if path is not None:
                stack.enter_context(_held(path.resolve()))
        bench = Bench(protocol=protocol, results=Results(results, protocol.told()), folder=folder)
        bench.dense()
        protocol.collect(model, folder / "store", STATISTICS)
        for name in filter(None, sequential.split(",")):
            for target in wanted:
                bench.sequential(name, target)
        for name, options in ROWS if not sequential else ():
            if rows in name:
                bench.row(name, options, wanted)
        print(heading("What pruning costs"))
        dense = bench.results.rows[DENSE][DENSE]
        print(f"{Path(model).name}: dense {dense:.2f}, {math.log(dense):.4f} nats.\n")
        print("\n\n".join(bench.results.tables(wanted)))


if __name__ == "__main__":
    typer.run(main)
