"""The table of goals, measured again: every benchmark of CPU time in one run, in one dated file.

    make bench                                           # under 15 minutes on two cores
    python benchmarks/bench.py OUT.json --only startup,solvers

It runs what `startup.py`, `prune.py`, `collect.py`, `streamed.py` and `solvers.py` run, fewer
times. All figures are ratios of sides that take turns, so that a busy machine slows both; `before`
is what was measured when the goals were set. What a part has found is kept if a later one fails.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final

import torch
import typer

from benchmarks import collect, prune, solvers, startup, streamed
from benchmarks.measures import Measure, measures_table, write_results
from benchmarks.random_llama import (
    STATISTICS,
    LlamaSize,
    heading,
    interleaved,
    median_ratio,
    write_checkpoint,
    write_store,
)
from gradpipe.stages.checkpoint.folder import Checkpoint

MOMENTS: Final = (*STATISTICS, "hessian", "grad_cov")


def measure_startup(folder: Path) -> Iterator[Measure]:
    """Commands that do little."""
    return startup.measure(3, folder)


def measure_prune(folder: Path) -> Iterator[Measure]:
    """Stage two against copies, and on one core against two."""
    model, store = folder / "model", folder / "store"
    write_checkpoint(model, LlamaSize())
    write_store(model, store)
    bench = prune.Bench(model=model, store=store, out=folder / "out")
    names = (prune.COPY, prune.COPIES, prune.ONE, prune.ONE_PASS, prune.ALONE)
    sides = {name: bench.sides()[name] for name in names}
    seconds = interleaved(sides, 3, between=bench.clean)
    yield _ratio(seconds, prune.ONE, prune.COPY, 3, "6.9–10.3 ×")
    yield _ratio(seconds, prune.ONE_PASS, prune.COPIES, 2.5, "6.3–7.8 ×")
    yield _ratio(seconds, prune.ONE, prune.ALONE, 1 / 1.7, "1 ×")


def measure_collect(folder: Path) -> Iterator[Measure]:
    """The resident schedule against a bare forward and backward, without and with moments."""
    write_checkpoint(folder / "model", LlamaSize())
    checkpoint = Checkpoint.open(str(folder / "model"))
    for statistics, goal, before in ((STATISTICS, 1.05, "1.02–1.13 ×"), (MOMENTS, 1.5, "")):
        work = collect.Work(seq_len=512, batch_size=1, batches=2, statistics=statistics)
        sides = collect.Rig(checkpoint, work).sides()
        seconds = interleaved({name: sides[name] for name in (collect.LAYERS, collect.HOOKS)}, 2)
        value = median_ratio(seconds[collect.HOOKS], seconds[collect.LAYERS])
        name = f"collect, resident, {', '.join(statistics)} ÷ bare"
        yield Measure(name=name, value=value, unit="×", goal=goal, before=before)


def measure_streamed(folder: Path) -> Iterator[Measure]:
    """Whole collections, streamed against resident."""
    write_checkpoint(folder / "model", LlamaSize())
    count = iter(range(1000))

    def run(schedule: str) -> None:
        store = folder / f"store-{next(count)}"
        streamed.run_collect(folder / "model", store, schedule, num_samples=8, seq_len=256)

    sides = {name: (lambda name=name: run(name)) for name in ("streamed", "resident")}
    yield _ratio(interleaved(sides, 2), "streamed", "resident", 1.36, "1.38 ×")


def measure_solvers(folder: Path) -> Iterator[Measure]:
    """SparseGPT against its published loop, ALPS against it; nothing lies in `folder`."""
    del folder
    torch.set_num_threads(1)
    for row in solvers.sparsegpt_rows(2):
        shape, target, ratio = row[0], row[1], float(row[4])
        name = f"sparsegpt, {shape}, {target} ÷ published loop"
        yield Measure(name=name, value=ratio, unit="×", goal=0.35, before="1.0 ×")
    for name, _, _, to_sparsegpt in solvers.alps_rows(1):
        if name.startswith("alps"):
            label = f"{name}, a block of a 135 M Llama, four targets ÷ sparsegpt"
            before = "~13 ×" if "kfac" in name else ""
            yield Measure(name=label, value=float(to_sparsegpt), unit="×", goal=3, before=before)


PARTS: Final[Mapping[str, Callable[[Path], Iterator[Measure]]]] = {
    "startup": measure_startup,
    "prune": measure_prune,
    "collect": measure_collect,
    "streamed": measure_streamed,
    "solvers": measure_solvers,
}


def _ratio(
    seconds: Mapping[str, Sequence[float]], side: str, base: str, goal: float, before: str
) -> Measure:
    value = median_ratio(seconds[side], seconds[base])
    return Measure(name=f"{side} ÷ {base}", value=value, unit="×", goal=goal, before=before)


def main(
    out: Annotated[Path, typer.Argument(help="The JSON file to write.")],
    only: Annotated[str, typer.Option(help="Comma-separated parts.")] = ",".join(PARTS),
) -> None:
    """Run the parts, one after the other; print one table."""
    found: dict[str, list[Measure]] = {}
    errors: dict[str, str] = {}
    for name in only.split(","):
        print(f"{name} …", flush=True)
        found[name] = []
        try:
            with tempfile.TemporaryDirectory() as folder:
                for one in PARTS[name](Path(folder)):
                    found[name].append(one)
        except Exception as error:  # noqa: BLE001 - the other parts must still run
            errors[name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        write_results(out, "Goals", found, errors)
    print(heading("Goals"))
    print(measures_table([x for measures in found.values() for x in measures]))
    raise typer.Exit(1 if errors else 0)


if __name__ == "__main__":
    typer.run(main)
