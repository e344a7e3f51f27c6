"""How both stages grow: time, memory and disk against depth, width, samples and ranks.

    python benchmarks/scaling.py OUT.json [--plot docs/scaling.svg]     # about 3 minutes

Small random Llamas, one property changed at a time; each collection (streamed) and each pruning
(gblm, 50 %, one worker) is a fork of a process that has imported everything, so that its CPU
seconds and its peak are its own. Ranks are shards: of samples when collecting, of files when
pruning; a point has the dearest rank, and the sum of all with their merge. Samples are random
tokens: tokenizing a long text takes more memory than models of this size.

Then what `--dry-run` estimates for three Llamas, from their configs alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

import gradpipe
from benchmarks.measures import Cost, in_a_fork
from benchmarks.random_llama import (
    MB,
    STATISTICS,
    LlamaSize,
    heading,
    machine,
    table,
    write_checkpoint,
)
from gradpipe import (
    CollectConfig,
    DataConfig,
    PruneConfig,
    Shard,
    collect,
    collect_shard,
    merge,
    prune,
)
from gradpipe.pipeline.recipes import RECIPES
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.collect.estimate import Estimate

BASE: Final = LlamaSize(
    hidden=256, blocks=8, intermediate=704, heads=4, vocab=512, positions=128, blocks_per_shard=1
)
SEQ_LEN: Final = 128
AXES: Final[dict[str, tuple[int, ...]]] = {
    "depth": (4, 8, 16, 32),
    "width": (128, 256, 512, 1024),
    "samples": (8, 16, 32, 64),
    "ranks": (1, 2, 4, 8),
}
QUICK: Final = {"depth": 8, "width": 256, "samples": 16, "ranks": 1}  # what the others are at
LLAMAS: Final[dict[str, dict[str, Any]]] = {  # Llama-2-7B, Llama-3-70B, Llama-3.1-405B
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
             "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One size, and what both stages took."""

    axis: str
    at: int
    weights: int  # of the layers that are pruned
    collect: Cost  # the dearest rank
    collect_sum: float  # CPU seconds of all ranks and of the merge
    store_bytes: int
    prune: Cost
    prune_sum: float
    out_bytes: int


def sizes() -> Iterator[tuple[str, int, LlamaSize, int, int]]:
    """Axis, where on it, the model, samples and ranks."""
    for axis, values in AXES.items():
        for at in values:
            point = {**QUICK, axis: at}
            size = replace(
                BASE,
                blocks=point["depth"],
                hidden=point["width"],
                intermediate=point["width"] * 11 // 4,
            )
            yield axis, at, size, point["samples"], point["ranks"]


def measure(axis: str, at: int, size: LlamaSize, samples: int, ranks: int, folder: Path) -> Point:
    """Collect and prune once."""
    model, store, out = folder / "model", folder / "store", folder / "out"
    write_checkpoint(model, size)
    ids = np.random.default_rng(0).integers(size.vocab, size=(samples, SEQ_LEN), dtype=np.int32)
    np.save(folder / "ids.npy", ids)
    config = CollectConfig(
        model=str(model),
        store=store,
        data=DataConfig(name=str(folder / "ids.npy")),
        num_samples=samples,
        seq_len=SEQ_LEN,
        statistics=STATISTICS,
        schedule="streamed",
    )
    collected = [in_a_fork(_collecting(config, x)) for x in _shards(ranks)]
    merging = in_a_fork(lambda: merge([store])).cpu_seconds if ranks > 1 else 0.0
    pruning = PruneConfig(model=str(model), store=str(store), out=out, workers=1)
    pruned = [in_a_fork(_pruning(pruning, x)) for x in _shards(ranks)]
    infos = Checkpoint.open(str(model)).tensors.values()
    return Point(
        axis=axis,
        at=at,
        weights=sum(x.shape[0] * x.shape[1] for x in infos if ".layers." in x.key and x.is_matrix),
        collect=max(collected, key=lambda x: x.cpu_seconds),
        collect_sum=sum(x.cpu_seconds for x in collected) + merging,
        store_bytes=_bytes(store),
        prune=max(pruned, key=lambda x: x.cpu_seconds),
        prune_sum=sum(x.cpu_seconds for x in pruned),
        out_bytes=_bytes(out),
    )


def _shards(ranks: int) -> list[Shard | None]:
    return [None] if ranks == 1 else [Shard(index, ranks) for index in range(ranks)]


def _collecting(config: CollectConfig, shard: Shard | None) -> Any:
    if shard is None:
        return lambda: collect(config)
    return lambda: collect_shard(replace(config, shard=shard))


def _pruning(config: PruneConfig, shard: Shard | None) -> Any:
    return lambda: prune(replace(config, shard=shard))


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --- what the points say


def exponent(at: Sequence[float], values: Sequence[float]) -> float:
    """The power with which values grow: the slope of their logarithms."""
    return float(np.polyfit(np.log(at), np.log(values), 1)[0])


def line(at: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """What is there at nothing, and what each unit adds: least squares."""
    slope, start = np.polyfit(at, values, 1)
    return float(start), float(slope)


def points_table(points: Sequence[Point]) -> str:
    """All points."""
    header = [
        "axis", "at", "weights, M", "collect, CPU s", "all ranks", "peak, MB", "written, MB",
        "store, MB", "prune, CPU s", "all ranks", "peak, MB", "output, MB",
    ]  # fmt: skip
    rows = [
        [
            x.axis, str(x.at), f"{x.weights / 1e6:.1f}",
            f"{x.collect.cpu_seconds:.2f}", f"{x.collect_sum:.2f}",
            f"{x.collect.peak_bytes / MB:.0f}", f"{x.collect.written_bytes / MB:.0f}",
            f"{x.store_bytes / MB:.1f}", f"{x.prune.cpu_seconds:.2f}", f"{x.prune_sum:.2f}",
            f"{x.prune.peak_bytes / MB:.0f}", f"{x.out_bytes / MB:.0f}",
        ]
        for x in points
    ]  # fmt: skip
    return table(header, rows)


FORMS: Final[dict[str, tuple[str, float]]] = {  # what CPU seconds are a line of, and its power
    "depth": ("depth", 1),
    "width": ("width²", 2),
    "samples": ("samples", 1),
    "ranks": ("1 ÷ ranks", -1),
}


def fits_table(points: Sequence[Point]) -> str:
    """Along each axis: powers of what was measured, and the lines of CPU seconds."""
    rows = []
    for axis, group in groupby(points, key=lambda x: x.axis):
        some = list(group)
        at = [float(x.at) for x in some]
        series = [
            [x.collect.cpu_seconds for x in some],
            [float(x.collect.peak_bytes) for x in some],
            [float(x.store_bytes) for x in some],
            [x.prune.cpu_seconds for x in some],
            [float(x.prune.peak_bytes) for x in some],
        ]
        form, power = FORMS[axis]
        lines = [line([x**power for x in at], values) for values in (series[0], series[3])]
        powers = [f"{exponent(at, values):.2f}" for values in series]
        rows.append(
            [axis, *powers, *(f"{start:.2f} + {slope:.3g} · {form}" for start, slope in lines)]
        )
    header = [
        "axis", "collect, CPU", "its peak", "store", "prune, CPU", "its peak",
        "collect, CPU s", "prune, CPU s",
    ]  # fmt: skip
    return table(header, rows)


SHOWN: Final[tuple[tuple[str, Callable[[Cost], float]], ...]] = (
    ("CPU s", lambda x: x.cpu_seconds),
    ("peak, MB", lambda x: x.peak_bytes / MB),
)


def plot(points: Sequence[Point], path: Path) -> None:
    """Time and memory against each axis; the same points give the same file."""
    import matplotlib as mpl  # noqa: PLC0415 - only a plot needs it

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "gradpipe", "font.size": 8}
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, grid = plt.subplots(2, len(AXES), figsize=(11, 5), sharey="row", squeeze=False)
    for column, axis in enumerate(AXES):
        some = [x for x in points if x.axis == axis]
        at = [x.at for x in some]
        for row, (label, of) in enumerate(SHOWN):
            panel = grid[row][column]
            panel.loglog(at, [of(x.collect) for x in some], "o-", label="collect, streamed")
            panel.loglog(at, [of(x.prune) for x in some], "s--", label="prune, gblm 50 %")
            panel.set_xticks(at, [str(x) for x in at])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            panel.set_ylabel(label if column == 0 else "")
            panel.set_xlabel(axis if row else "")
    grid[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


# --- models that are not here


def estimates(folder: Path) -> Iterator[list[str]]:
    """What `--dry-run` says of each Llama: 128 samples of 2,048 tokens, streamed."""
    for name, config in LLAMAS.items():
        for label, statistics in (("default", STATISTICS), ("best", RECIPES["best"].statistics)):
            found = _estimate(folder / name, config, statistics)
            gb = (
                found.num_parameters * 2,
                found.device_bytes,
                found.store_bytes,
                found.scratch_bytes,
                found.read_bytes,
            )
            values = [f"{x / 1e9:,.1f}" for x in gb]
            yield [f"{name}, {label}", *values, f"{found.flops / 1e15:,.0f}"]


def _estimate(folder: Path, config: dict[str, Any], statistics: tuple[str, ...]) -> Estimate:
    """From a config, as a checkpoint without weights has it."""
    if not folder.exists():
        full = LlamaConfig(
            **config,
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        )
        full.save_pretrained(folder)
    asked = CollectConfig(
        model=str(folder),
        store=folder / "store",
        seq_len=2048,
        statistics=statistics,
        schedule="streamed",
        device="cpu",
    )
    return gradpipe.plan(asked)


def main(
    out: Annotated[Path, typer.Argument(help="The JSON file to write.")],
    plotted: Annotated[Path | None, typer.Option("--plot", help="An SVG to draw.")] = None,
) -> None:
    """Measure all points; print tables."""
    torch.set_num_threads(1)
    LlamaForCausalLM.__name__  # noqa: B018 - transformers imports a model's code when it is named
    points = []
    for axis, at, size, samples, ranks in sizes():
        with tempfile.TemporaryDirectory() as folder:
            points.append(measure(axis, at, size, samples, ranks, Path(folder)))
    document = {"machine": machine(), "points": [asdict(x) for x in points]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if plotted is not None:
        plot(points, plotted)
    with tempfile.TemporaryDirectory() as folder:
        header = ["Llama, statistics", "weights, GB", "device, GB", "store, GB", "scratch, GB",
                  "read, GB", "PFLOP"]  # fmt: skip
        foreseen = table(header, list(estimates(Path(folder))))
    print(heading("Scaling"), points_table(points), fits_table(points), foreseen, sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
