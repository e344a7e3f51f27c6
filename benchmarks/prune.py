"""What stage two costs above moving the bytes: time, and peak memory.

    python benchmarks/prune.py                               # about 3 minutes on two cores
    python benchmarks/prune.py --model DIR --store DIR       # as random_llama.py makes them

In one run, in turns, page cache warm: a copy of the checkpoint's files, made durable as an output
is, plus a read of every object of the store, against `prune` by GBLM (l1) to one sparsity, to three
in one pass, and to the same three by three commands. The store is a default one, and all of it is
read: `grad_l1` is coded against `grad_l2`. Peak memory is of a process of its own for each side.
Stages are timed apart, one after another over the same layers; `prune` itself works on a layer in
each core.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Final

import torch
import typer

from benchmarks.random_llama import (
    MB,
    LlamaSize,
    Usage,
    heading,
    interleaved,
    median_ratio,
    peak_of,
    report_peak,
    spread,
    table,
    write_checkpoint,
    write_store,
)
from gradpipe import GradientStore, PruneConfig, prune
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.checkpoint.tensors import as_tensor, count_zeros, tensor_bytes
from gradpipe.stages.prune.mask import budget_mask
from gradpipe.stages.prune.methods import find_score
from gradpipe.stages.prune.score import LayerStatistics, score_layer
from gradpipe.stages.prune.target import Group, Target
from gradpipe.store.objects import digest, fsync

STATISTICS: Final = ("grad_l1", "act_l2")  # and grad_l2, which grad_l1 is coded against
ALPHA: Final = 100.0
SPARSITIES: Final = (0.5, 0.6, 0.7)
COPY: Final = "1 copy + read"
COPIES: Final = "3 copies + read"
ONE: Final = "prune, 1 sparsity"
ONE_PASS: Final = "prune, 3 in one pass"
SEPARATE: Final = "prune, 3 commands"
ALONE: Final = "prune, 1 sparsity, 1 worker"

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What is pruned, and where to."""

    model: Path
    store: Path
    out: Path

    def sides(self) -> dict[str, Callable[[], None]]:
        """What is compared, by name."""
        return {
            COPY: lambda: self.move_bytes(1),
            COPIES: lambda: self.move_bytes(len(SPARSITIES)),
            ONE: lambda: self.prune(SPARSITIES[:1], self.out),
            ONE_PASS: lambda: self.prune(SPARSITIES, self.out),
            SEPARATE: self.prune_separately,
            ALONE: lambda: self.prune(SPARSITIES[:1], self.out, workers=1),
        }

    def move_bytes(self, copies: int) -> None:
        """The least that `copies` outputs can take."""
        for path in self.store.rglob("*"):
            if path.is_file():
                path.read_bytes()
        for number in range(copies):
            copy_durably(self.model, self.out / str(number))

    def prune(self, sparsities: tuple[float, ...], out: Path, workers: int | None = None) -> None:
        """One command."""
        config = PruneConfig(
            model=str(self.model),
            store=str(self.store),
            out=out,
            sparsities=sparsities,
            alpha=ALPHA,
            workers=workers,
        )
        prune(config)

    def prune_separately(self) -> None:
        """One command for each sparsity."""
        for sparsity in SPARSITIES:
            self.prune((sparsity,), self.out / str(sparsity))

    def clean(self) -> None:
        """Remove what a side wrote, and let the disk come to rest."""
        shutil.rmtree(self.out, ignore_errors=True)
        os.sync()


def copy_durably(source: Path, target: Path) -> None:
    """Copy the files of a folder, each followed by fsync."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())
    fsync(target)


class StageClock:
    """Seconds by stage."""

    def __init__(self) -> None:
        """All at zero."""
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time what happens within."""
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start


def time_stages(bench: Bench) -> dict[str, float]:
    """Seconds of each stage of pruning to one sparsity, over all layers."""
    checkpoint, store = Checkpoint.open(str(bench.model)), GradientStore.open(bench.store)
    clock, cpu, target = StageClock(), torch.device("cpu"), Target(SPARSITIES[0])
    score = find_score("gblm", "l1", ALPHA)
    bench.out.mkdir()
    path = bench.out / "tensors"
    with path.open("wb") as file:
        for layer in store.spec.layers:
            with clock("read the weight"):
                data = checkpoint.read_bytes(layer.weight_key)
            with clock("its digest"):
                digest(data)
            with clock("read, verify and decompress the statistics"):
                encoded = store.read(layer, STATISTICS)
            weight_OI = as_tensor(data, checkpoint.tensors[layer.weight_key])
            statistics = LayerStatistics.decode(encoded, STATISTICS, cpu)
            with clock("decode them to norms, and score"):
                score_OI = score_layer(layer.name, weight_OI, statistics, score)
            with clock("mask"):
                mask_OI = budget_mask(score_OI, target.budget, Group.parse("output"))
            with clock("fill with zeros"):
                pruned_OI = (weight_OI.view(torch.int32) * mask_OI).view(torch.float32)
            with clock("digest of the output"):
                digest(tensor_bytes(pruned_OI))
            with clock("write"):
                file.write(tensor_bytes(pruned_OI))
        with clock("fsync"):
            file.flush()
            os.fsync(file.fileno())
    read_back(checkpoint, store, path, clock)
    bench.clean()
    return dict(clock.seconds)


def read_back(checkpoint: Checkpoint, store: GradientStore, path: Path, clock: StageClock) -> None:
    """The stages that look at what was written."""
    with path.open("rb") as file:
        for layer in store.spec.layers:
            info = checkpoint.tensors[layer.weight_key]
            with clock("read the output back"):
                data = bytearray(info.stop - info.start)
                file.readinto(data)
            with clock("digest of what was read back"):
                digest(data)
            with clock("count its zeros"):
                count_zeros(as_tensor(data, info))


def report(
    bench: Bench,
    seconds: dict[str, list[float]],
    usages: dict[str, Usage],
    stages: list[dict[str, float]],
) -> str:
    """The tables."""
    checkpoint = Checkpoint.open(str(bench.model))
    rows = [
        [
            name,
            spread(seconds[name]),
            f"{median_ratio(seconds[name], seconds[COPY]):.2f}",
            f"{median_ratio(seconds[name], seconds[COPIES]):.2f}",
            usages[name].peak,
            f"{100 * usages[name].peak_bytes / checkpoint.num_bytes:.1f} %",
        ]
        for name in seconds
    ]
    header = ["side", "s", f"÷ {COPY}", f"÷ {COPIES}", "peak above import", "of the checkpoint"]
    medians = {stage: median(run[stage] for run in stages) for stage in stages[0]}
    total = sum(medians.values())
    parts = [[s, f"{t:.3f}", f"{100 * t / total:.0f} %"] for s, t in medians.items()]
    about = (
        f"Llama of {checkpoint.num_bytes / MB:,.0f} MB in {len(checkpoint.files)} files, store of "
        f"{sum(GradientStore.open(bench.store).sizes().values()) / MB:,.0f} MB; gblm, l1, "
        f"sparsity {SPARSITIES[0]}, or {', '.join(map(str, SPARSITIES))}; "
        f"median (least to most) of {len(seconds[COPY])} repeats in turns.\n"
    )
    stage_table = table(["stage, alone", "s", "share"], [*parts, ["all", f"{total:.3f}", "100 %"]])
    return "\n".join([heading("Stage two: prune"), about, table(header, rows), "", stage_table])


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    model: Annotated[
        Path | None, typer.Option(help="A checkpoint, instead of the random 97.5 M parameters.")
    ] = None,
    store: Annotated[Path | None, typer.Option(help="Its store, instead of random sums.")] = None,
) -> None:
    """Compare stage two with moving the bytes; print tables."""
    if context.invoked_subcommand is not None:
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if model is None:
            model = root / "model"
            write_checkpoint(model, LlamaSize())
        if store is None:
            store = root / "store"
            write_store(model, store)
        compare(Bench(model=model, store=store, out=root / "out"), repeats)


@app.command(hidden=True)
def side(name: str, model: Path, store: Path, out: Path) -> None:
    """Run one side alone, and print what it took."""
    report_peak(Bench(model=model, store=store, out=out).sides()[name])


def compare(bench: Bench, repeats: int) -> None:
    """Measure memory, time and stages, and print the tables."""
    usages = {}
    for name in bench.sides():
        usages[name] = peak_of(__file__, "side", name, bench.model, bench.store, bench.out)
        bench.clean()
    seconds = interleaved(bench.sides(), repeats, between=bench.clean)
    stages = [time_stages(bench) for _ in range(repeats)]
    print(report(bench, seconds, usages, stages))


if __name__ == "__main__":
    app()
