"""The command's options: types and help. Defaults stand in `cli.py`, checks in the configs."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from gradpipe.errors import InputError
from gradpipe.stages.prune.methods import METHODS
from gradpipe.store.schema import OBJECTIVES
from gradpipe.store.statistics import DEFAULT_STATISTICS, STATISTICS


def _print_version(wanted: bool) -> None:  # noqa: FBT001 (typer calls it with the flag)
    if wanted:
        typer.echo(f"pipe {version('gradpipe')}")
        raise typer.Exit


def _share(text: str) -> float:
    """A sparsity as the user wrote it; its range is the config's to check."""
    try:
        return float(text)
    except ValueError:
        raise InputError(
            f"--sparsity {text}: expected one number in [0, 1), the share to prune, as 0.5; repeat "
            "--sparsity for several"
        ) from None


Version = Annotated[
    bool,
    typer.Option(
        "--version", help="Print the version, and stop.", callback=_print_version, is_eager=True
    ),
]

Model = Annotated[str, typer.Argument(help="Model directory, Hub id, or `embedded`.")]

Include = Annotated[list[str], typer.Option(help="Regex on layer names; repeatable.")]

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]

Dtype = Annotated[
    str,
    typer.Option(help="auto (the checkpoint's; float32 for float64), float32, bfloat16, float16."),
]

Task = Annotated[
    str | None, typer.Option(help=f"{', '.join(OBJECTIVES)} [default: by the architecture].")
]

Dataset = Annotated[
    str,
    typer.Option(
        help="c4, wikitext2, stdlib, .txt/.jsonl[.gz]/.parquet files, .npy tokens, a Hub id; "
        "for images a folder of class folders."
    ),
]

DatasetConfig = Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")]

Split = Annotated[str | None, typer.Option(help="Split of a Hub dataset.")]

Revision = Annotated[str | None, typer.Option(help="Commit of a Hub dataset.")]

TextColumn = Annotated[str, typer.Option(help="Column that holds the text.")]

SeqLen = Annotated[
    int | None, typer.Option(help="Tokens of a window [default: 2048, or the model's maximum].")
]

BatchSize = Annotated[
    int, typer.Option(help="Samples in one pass; results depend on it up to rounding.")
]

Json = Annotated[Path | None, typer.Option("--json", help="Write the result here; - for stdout.")]

Blocks = Annotated[str | None, typer.Option(help="Path of the block list, as model.layers.")]

Statistics = Annotated[
    list[str],
    typer.Option(
        help=f"Of {', '.join(STATISTICS)}, repeatable [default: {','.join(DEFAULT_STATISTICS)}]."
    ),
]

Recipe = Annotated[
    str | None, typer.Option(help="best: the recommended options; other flags change them.")
]

Encoding = Annotated[str, typer.Option(help="compact, float32 or float16.")]

Schedule = Annotated[
    str, typer.Option(help="auto, resident, or streamed: one block in memory at a time.")
]

Scratch = Annotated[
    Path | None, typer.Option(help="Folder for streamed activations [default: in the store].")
]

CheckpointEvery = Annotated[
    int | None, typer.Option(help="Samples between snapshots [default: under 5 % of the time].")
]

ShardOption = Annotated[
    str | None,
    typer.Option("--shard", help="I/N: be job I of N on this store [default: Slurm's array task]."),
]

Finalize = Annotated[
    bool, typer.Option("--finalize", help="If this shard is the last to finish, merge them.")
]

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what it would take, and stop.")]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what exists.")]

Pruned = Annotated[
    list[float],
    typer.Option(
        "--sparsity",
        help="Share to prune, repeatable [default: 0.5, or of an allocation file its mean].",
        parser=_share,
        metavar="FLOAT",
    ),
]

Patterns = Annotated[
    list[str], typer.Option("--pattern", help="n:m, n kept of every m inputs, repeatable.")
]

MethodName = Annotated[str | None, typer.Option(help=f"{', '.join(METHODS)} [default: gblm].")]

Formula = Annotated[
    str | None, typer.Option(help="A formula in the method's place: abs(W)*(a*G1+X).")
]

Alpha = Annotated[float, typer.Option(help="`a` in formulas: the gradient's weight.")]

GradNorm = Annotated[str, typer.Option(help="`G` in formulas: l1, l2 or sum.")]

Update = Annotated[
    str | None, typer.Option(help="Of kept weights: none, obs, lsq [default: none].")
]

CurvatureName = Annotated[
    str | None, typer.Option(help="What lsq, alps minimise: input, kfac [default: input].")
]

AllocationName = Annotated[
    str | None,
    typer.Option(help="uniform, owl, dlp, sensitivity, a JSON file [default: uniform]."),
]

AllocationScore = Annotated[
    str | None, typer.Option(help="Method or formula that the allocation looks at.")
]

MixedPatterns = Annotated[
    bool, typer.Option("--mixed-patterns", help="Let the allocation choose n for each block.")
]

GroupName = Annotated[
    str | None,
    typer.Option(
        help="Weights compared: output, input, layer, global, output:K, input:K "
        "[default: output; alps: layer]."
    ),
]

AllowMismatch = Annotated[
    bool, typer.Option("--allow-mismatch", help="Prune weights that were not measured.")
]
