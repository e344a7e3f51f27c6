"""What stage one costs above an ordinary forward and backward: time, and peak memory.

    python benchmarks/collect.py                       # about 3 minutes on two cores
    python benchmarks/collect.py --seq-len 2048 --batches 1

In one run, in turns, on the same batches of the same model: forward and backward with ordinary
weight gradients, each `.grad` dropped between batches, against the resident schedule with every
weight frozen and the hooks on. The multiplications are the same ones, so the goal is at most 1.25
times the time. Peak memory is of a process of its own for each side.

Shapes: B samples, T tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer
from torch import Tensor, nn
from transformers import LlamaForCausalLM

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
)
from gradpipe import CollectConfig, DataConfig, collect
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.collect.resident import resident_batch
from gradpipe.stages.collect.sums import LayerAccumulator
from gradpipe.stages.model.batch import Batch
from gradpipe.stages.model.experts import split_experts
from gradpipe.stages.model.layers import Layer
from gradpipe.stages.model.load import load_model, resolve_dtype
from gradpipe.stages.model.skeleton import take_apart

GOAL: Final = 1.25
LAYERS: Final = "bare, block linears"
ALL: Final = "bare, all parameters"
HOOKS: Final = "resident schedule"
WHOLE: Final = "whole `collect`"

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is measured."""

    seq_len: int
    batch_size: int
    batches: int
    statistics: tuple[str, ...]

    def options(self) -> list[str]:
        """As the command line gives them."""
        return [
            f"--seq-len={self.seq_len}",
            f"--batch-size={self.batch_size}",
            f"--batches={self.batches}",
            f"--statistics={','.join(self.statistics)}",
        ]


class Rig:
    """A loaded model and its batches."""

    def __init__(self, checkpoint: Checkpoint, work: Work) -> None:
        """Load the model, and draw the batches."""
        self.model: Any = load_model(
            checkpoint, resolve_dtype("auto", checkpoint), torch.device("cpu")
        )
        skeleton = take_apart(checkpoint, self.model.dtype)
        split_experts(self.model, skeleton.sources)
        self.layers: tuple[Layer, ...] = skeleton.layers
        self.statistics = work.statistics
        self.batches: list[Tensor] = [
            torch.randint(
                self.model.config.vocab_size,
                (work.batch_size, work.seq_len),
                generator=torch.Generator().manual_seed(seed),
            )
            for seed in range(work.batches)
        ]
        self._sums: dict[str, LayerAccumulator] = {}

    def bare(self, weights: list[nn.Parameter]) -> None:
        """Ordinary gradients of `weights`, the mean-token loss of each sample counting alike."""
        for weight in weights:
            weight.requires_grad = True
        for ids_BT in self.batches:
            loss = self.model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
            (loss * len(ids_BT)).backward()
            for weight in weights:
                weight.grad = None
        for weight in weights:
            weight.requires_grad = False

    def bare_layers(self) -> None:
        """Gradients of the weights that stage one measures."""
        self.bare([self.model.get_parameter(f"{layer.path}.weight") for layer in self.layers])

    def bare_all(self) -> None:
        """Gradients of everything, as in training: embeddings, norms and head too."""
        self.bare(list(self.model.parameters()))

    def hooks(self) -> None:
        """What stage one does."""
        if not self._sums:
            cpu = torch.device("cpu")
            names = self.statistics
            self._sums = {x.path: LayerAccumulator(x.spec, names, cpu) for x in self.layers}
        for ids_BT in self.batches:
            resident_batch(self.model, self._sums, Batch.of_tokens(ids_BT))

    def sides(self) -> dict[str, Callable[[], None]]:
        """What is compared, by name."""
        return {LAYERS: self.bare_layers, ALL: self.bare_all, HOOKS: self.hooks}


def run_whole(model: Path, work: Work) -> None:
    """All of stage one, into a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        collect(
            CollectConfig(
                model=str(model),
                store=Path(folder) / "store",
                data=DataConfig(name="stdlib"),
                num_samples=work.batch_size * work.batches,
                seq_len=work.seq_len,
                batch_size=work.batch_size,
                statistics=work.statistics,
            )
        )


def run_side(side: str, model: Path, work: Work) -> None:
    """One side from nothing: the model is loaded too."""
    if side == WHOLE:
        run_whole(model, work)
    else:
        Rig(Checkpoint.open(str(model)), work).sides()[side]()


def report(
    checkpoint: Checkpoint, work: Work, seconds: dict[str, list[float]], usages: dict[str, Usage]
) -> str:
    """The table."""
    per_batch = {name: [s / work.batches for s in values] for name, values in seconds.items()}
    rows = [
        [
            name,
            spread(per_batch[name]),
            f"{median_ratio(per_batch[HOOKS], per_batch[name]):.3f}",
            usages[name].peak,
        ]
        for name in seconds
    ]
    rows.append([WHOLE, f"{usages[WHOLE].seconds:.1f} in all", "", usages[WHOLE].peak])
    header = ["side", "s per batch", f"{HOOKS} ÷ it", "peak above import"]
    about = (
        f"Llama of {checkpoint.num_bytes / MB:,.0f} MB; {work.batches} batches of "
        f"{work.batch_size} × {work.seq_len} tokens; {', '.join(work.statistics)}; "
        f"goal: ≤ {GOAL}. Median (least to most) of {len(seconds[HOOKS])} repeats in turns.\n"
    )
    return "\n".join([heading("Stage one: collect"), about, table(header, rows)])


SeqLen = Annotated[int, typer.Option(min=2)]
Count = Annotated[int, typer.Option(min=1)]
Statistics = Annotated[str, typer.Option(help="Comma-separated.")]
STATISTICS: Final = "grad_l1,grad_l2,act_l2"


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    seq_len: SeqLen = 512,
    batch_size: Count = 1,
    batches: Count = 2,
    repeats: Count = 5,
    statistics: Statistics = STATISTICS,
    model: Annotated[
        Path | None, typer.Option(help="A checkpoint, instead of the random 97.5 M parameters.")
    ] = None,
) -> None:
    """Compare stage one with a bare forward and backward; print a table."""
    work = Work(
        seq_len=seq_len,
        batch_size=batch_size,
        batches=batches,
        statistics=tuple(statistics.split(",")),
    )
    context.obj = work
    if context.invoked_subcommand is None:
        with tempfile.TemporaryDirectory() as folder:
            compare(model or _random_model(Path(folder)), work, repeats)


@app.command(hidden=True)
def side(context: typer.Context, name: str, model: Path) -> None:
    """Run one side alone, and print what it took."""
    LlamaForCausalLM.__name__  # noqa: B018 - transformers imports a model's code when it is named
    report_peak(lambda: run_side(name, model, context.obj))


def compare(model: Path, work: Work, repeats: int) -> None:
    """Measure memory, then time, and print the table."""
    checkpoint = Checkpoint.open(str(model))
    names = (LAYERS, ALL, HOOKS, WHOLE)
    usages = {name: peak_of(__file__, *work.options(), "side", name, model) for name in names}
    seconds = interleaved(Rig(checkpoint, work).sides(), repeats)
    print(report(checkpoint, work, seconds, usages))


def _random_model(folder: Path) -> Path:
    write_checkpoint(folder / "model", LlamaSize())
    return folder / "model"


if __name__ == "__main__":
    app()
