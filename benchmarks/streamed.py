"""The streamed schedule: time against resident, and memory against depth and against a block.

    python benchmarks/streamed.py                       # 12 blocks for time, 24 and 48 for memory
    python benchmarks/streamed.py large MODEL           # one large checkpoint, collected and pruned

Memory is each side's peak above its own imports, in a process of its own.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

import typer

from benchmarks.random_llama import (
    MB,
    LlamaSize,
    heading,
    interleaved,
    median_ratio,
    peak_of,
    report_peak,
    spread,
    table,
    write_checkpoint,
)
from gradpipe import CollectConfig, DataConfig, PruneConfig, collect, prune
from gradpipe.stages.checkpoint.folder import Checkpoint

STATISTICS: Final = ("grad_l1", "grad_l2", "act_l2")
DEPTHS: Final = (24, 48)
_NARROW: Final = LlamaSize(hidden=512, intermediate=1536, heads=8, vocab=4096)

app = typer.Typer(add_completion=False)


def run_collect(model: Path, store: Path, schedule: str, num_samples: int, seq_len: int) -> None:
    """All of stage one."""
    collect(
        CollectConfig(
            model=str(model),
            store=store,
            data=DataConfig(name="stdlib"),
            num_samples=num_samples,
            seq_len=seq_len,
            statistics=STATISTICS,
            schedule=schedule,
        )
    )


@app.command(hidden=True)
def side(model: Path, store: Path, schedule: str, num_samples: int, seq_len: int) -> None:
    """One collection alone, for `peak_of`."""
    report_peak(lambda: run_collect(model, store, schedule, num_samples, seq_len))


@app.command(hidden=True)
def side_prune(model: Path, store: Path, out: Path) -> None:
    """One pruning alone, for `peak_of`."""
    report_peak(lambda: prune(PruneConfig(model=str(model), store=str(store), out=out)))


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    num_samples: Annotated[int, typer.Option(min=1)] = 8,
    seq_len: Annotated[int, typer.Option(min=2)] = 256,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Compare the schedules; print two tables."""
    if context.invoked_subcommand is not None:
        return
    with tempfile.TemporaryDirectory() as folder:
        print(heading("The streamed schedule"))
        print(f"{num_samples} samples of {seq_len} tokens, {', '.join(STATISTICS)}.\n")
        print(time_table(Path(folder), num_samples, seq_len, repeats), "\n")
        print(memory_table(Path(folder), num_samples, seq_len))


def time_table(folder: Path, num_samples: int, seq_len: int, repeats: int) -> str:
    """Whole collections of the 97.5 M parameter Llama, the two schedules in turns."""
    write_checkpoint(folder / "time", LlamaSize())
    count = iter(range(1000))

    def run(schedule: str) -> None:
        store = folder / f"store-{next(count)}"
        run_collect(folder / "time", store, schedule, num_samples, seq_len)

    sides = {name: (lambda name=name: run(name)) for name in ("resident", "streamed")}
    seconds = interleaved(sides, repeats)
    rows = [
        [name, spread(values), f"{median_ratio(values, seconds['resident']):.2f}"]
        for name, values in seconds.items()
    ]
    return table(["schedule", "s", "÷ resident (goal ≤ 1.5)"], rows)


def memory_table(folder: Path, num_samples: int, seq_len: int) -> str:
    """Peaks at two depths, beside what the goal counts in blocks."""
    rows = []
    for blocks in DEPTHS:
        model = folder / f"deep-{blocks}"
        write_checkpoint(model, replace(_NARROW, blocks=blocks))
        weights, sums = block_bytes(Checkpoint.open(str(model)))
        for schedule in ("resident", "streamed"):
            store = folder / f"{schedule}-{blocks}"
            usage = peak_of(__file__, "side", model, store, schedule, num_samples, seq_len)
            allowed = f"{(3 * weights + sums) / MB:,.0f} MB" if schedule == "streamed" else ""
            rows.append([f"{schedule}, {blocks} blocks", usage.peak, allowed])
    return table(["side", "peak above import", "3 blocks' weights + accumulators"], rows)


def block_bytes(checkpoint: Checkpoint) -> tuple[int, int]:
    """Bytes of one block's weights, and of its float32 accumulators."""
    block = [x for x in checkpoint.tensors.values() if x.key.startswith("model.layers.0.")]
    values = sum(x.shape[0] * x.shape[1] for x in block if x.is_matrix)
    return sum(x.stop - x.start for x in block), 8 * values


@app.command()
def large(
    model: Path,
    num_samples: Annotated[int, typer.Option(min=1)] = 2,
    seq_len: Annotated[int, typer.Option(min=2)] = 128,
) -> None:
    """Collect and prune one large checkpoint; print what each took."""
    checkpoint = Checkpoint.open(str(model))
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        store, out = Path(folder) / "store", Path(folder) / "out"
        collected = peak_of(__file__, "side", model, store, "streamed", num_samples, seq_len)
        pruned = peak_of(__file__, "side-prune", model, store, out)
    rows = [
        ["collect, streamed", f"{collected.seconds:.0f}", collected.peak],
        ["prune, gblm 50 %", f"{pruned.seconds:.0f}", pruned.peak],
    ]
    print(heading("A checkpoint of billions of parameters"))
    print(f"{checkpoint.num_bytes / MB:,.0f} MB, {num_samples} samples of {seq_len} tokens.\n")
    print(table(["run", "s", "peak above import"], rows))


if __name__ == "__main__":
    app()
