"""The command `pipe`: options to configs, one call, errors to exit codes. Nothing else.

Data goes to stdout, progress and errors to stderr. Exit codes: 0 done; 1 a failure; 2 the user's
mistake; 3 the store is incomplete or damaged; 75 interrupted, run again to go on.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from gradpipe.errors import GradpipeError, InputError, Interrupted, StoreError
from gradpipe.pipeline import demo as demonstrating
from gradpipe.pipeline import evaluate as evaluating
from gradpipe.pipeline.collect import import_gblm as importing
from gradpipe.pipeline.collect import merge as merging
from gradpipe.pipeline.collect import run as collecting
from gradpipe.pipeline.collect.config import CollectConfig
from gradpipe.pipeline.flags import (
    AllocationName,
    AllocationScore,
    AllowMismatch,
    Alpha,
    BatchSize,
    Blocks,
    CheckpointEvery,
    CurvatureName,
    Dataset,
    DatasetConfig,
    Device,
    DryRun,
    Dtype,
    Encoding,
    Finalize,
    Formula,
    GradNorm,
    GroupName,
    Include,
    Json,
    MethodName,
    MixedPatterns,
    Model,
    Overwrite,
    Patterns,
    Pruned,
    Recipe,
    Revision,
    Schedule,
    Scratch,
    SeqLen,
    ShardOption,
    Split,
    Statistics,
    Task,
    TextColumn,
    Update,
    Version,
)
from gradpipe.pipeline.launch import slurm_shard
from gradpipe.pipeline.prune import run as pruning
from gradpipe.pipeline.prune.config import RECIPE_STATISTICS, PruneConfig, recipe_options
from gradpipe.pipeline.reports.tables import demo_table, layer_table, plan_table, store_table
from gradpipe.pipeline.terminal import Output, complain, prepare_streams, say, stderr, stdout
from gradpipe.stages.data.config import DataConfig
from gradpipe.store.reader import GradientStore
from gradpipe.store.shard import Shard
from gradpipe.store.statistics import DEFAULT_STATISTICS

_TYPER_INTERRUPTED = 130  # what typer makes of a KeyboardInterrupt

app = typer.Typer(
    name="pipe",
    help="One-shot pruning of language models from gradients: collect once, prune many times.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it would eat [default: …]
)
store_app = typer.Typer(help="Look at, check and import gradient stores.", no_args_is_help=True)
app.add_typer(store_app, name="store")


@app.callback()
def root(version: Version = False) -> None:
    """The options of `pipe` itself."""


@app.command()
def collect_grads(
    model: Model,
    store: Annotated[Path, typer.Argument(help="Folder to create.")],
    task: Task = None,
    dataset: Dataset = "c4",
    dataset_config: DatasetConfig = None,
    split: Split = None,
    revision: Revision = None,
    text_column: TextColumn = "text",
    num_samples: Annotated[int, typer.Option(help="Calibration windows or images.")] = 128,
    seq_len: SeqLen = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples drawn.")] = 0,
    batch_size: BatchSize = 1,
    statistics: Statistics = [],  # noqa: B006 (typer wants a list)
    recipe: Recipe = None,
    encoding: Encoding = "compact",
    blocks: Blocks = None,
    include: Include = [],  # noqa: B006 (as above)
    schedule: Schedule = "auto",
    scratch: Scratch = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    checkpoint_every: CheckpointEvery = None,
    shard: ShardOption = None,
    finalize: Finalize = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Stage one: stream calibration samples through a model and write a gradient store."""
    config = CollectConfig(
        model=model,
        store=store,
        task=task,
        data=_data(dataset, dataset_config, split, revision, text_column),
        num_samples=num_samples,
        seq_len=seq_len,
        seed=seed,
        batch_size=batch_size,
        statistics=_statistics(statistics, recipe),
        encoding=encoding,
        blocks=blocks,
        include=tuple(include),
        schedule=schedule,
        scratch=scratch,
        device=device,
        dtype=dtype,
        checkpoint_every=checkpoint_every,
        shard=_shard(shard),
        finalize=finalize,
        overwrite=overwrite,
    )
    if dry_run:
        stdout().print(plan_table(collecting.plan(config)))
        return
    run = collecting.collect if config.shard is None else collecting.collect_shard
    result = run(config, stderr())
    if result is not None:
        stdout().print(store_table(result))
    else:
        say(stderr(), f"shard {shard} is done: merge with pipe store merge {store}")


@app.command()
def prune(
    model: Model,
    store: Annotated[str, typer.Argument(help="Store: a path or a URL.")],
    out: Annotated[Path, typer.Argument(help="Folder to create; one in it for each of several.")],
    sparsity: Pruned = [],  # noqa: B006 (typer wants a list)
    pattern: Patterns = [],  # noqa: B006 (as above)
    recipe: Recipe = None,
    method: MethodName = None,
    score: Formula = None,
    alpha: Alpha = 100.0,
    grad_norm: GradNorm = "l1",
    update: Update = None,
    curvature: CurvatureName = None,
    allocation: AllocationName = None,
    allocation_score: AllocationScore = None,
    mixed_patterns: MixedPatterns = False,
    group: GroupName = None,
    include: Include = [],  # noqa: B006 (as above)
    exclude: Include = [],  # noqa: B006 (as above)
    device: Device = "auto",
    shard: ShardOption = None,
    allow_mismatch: AllowMismatch = False,
    overwrite: Overwrite = False,
) -> None:
    """Stage two: sparsify a checkpoint from a store, without running the model."""
    chosen = {
        "method": method,
        "score": score,
        "update": update,
        "curvature": curvature,
        "allocation": allocation,
        "group": group,
    }
    results = pruning.prune(
        PruneConfig(
            **recipe_options(recipe, {k: v for k, v in chosen.items() if v is not None}),
            model=model,
            store=store,
            out=out,
            sparsities=tuple(sparsity),
            patterns=tuple(pattern),
            alpha=alpha,
            grad_norm=grad_norm,
            allocation_score=allocation_score,
            mixed_patterns=mixed_patterns,
            include=tuple(include),
            exclude=tuple(exclude),
            device=device,
            shard=_shard(shard),
            allow_mismatch=allow_mismatch,
            overwrite=overwrite,
        ),
        stderr(),
    )
    if not results:
        say(stderr(), "this shard is done; the one that completes the files publishes OUT")
    for result in results:
        stdout().print(layer_table(result))


@app.command("eval")
def evaluate(
    model: Model,
    task: Task = None,
    dataset: Dataset = "wikitext2",
    dataset_config: DatasetConfig = None,
    split: Split = None,
    revision: Revision = None,
    text_column: TextColumn = "text",
    seq_len: SeqLen = None,
    max_windows: Annotated[int | None, typer.Option(help="Measure on the first ones only.")] = None,
    batch_size: BatchSize = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_file: Json = None,
) -> None:
    """Perplexity of a checkpoint, on windows that do not overlap; of images, top-1 accuracy."""
    output = Output(json_file)
    metrics = evaluating.measure(
        evaluating.EvalConfig(
            model=model,
            task=task,
            data=_data(dataset, dataset_config, split, revision, text_column),
            seq_len=seq_len,
            max_windows=max_windows,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
        ),
        stderr(),
    )
    output.show(dataclasses.asdict(metrics), metrics.summary)


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="Folder to create.")] = Path("gradpipe-demo"),
) -> None:
    """The whole of it on the embedded model: collect, prune with every method, compare."""
    result = demonstrating.demo(out, stderr())
    stdout().print(demo_table(result))
    say(stdout(), f"store and checkpoints: {result.folder}")


@store_app.command("info")
def store_info(
    store: Annotated[str, typer.Argument(help="Path or URL.")], json_file: Json = None
) -> None:
    """What a store holds, and of what."""
    output = Output(json_file)
    opened = GradientStore.open(store)
    document = {**opened.spec.to_json(), "digest": opened.digest, "bytes": opened.sizes()}
    output.show(document, store_table(opened))


@store_app.command("verify")
def store_verify(store: Annotated[str, typer.Argument(help="Path or URL.")]) -> None:
    """Read every object of a store and check it; exit 3 if one is damaged."""
    opened = GradientStore.open(store)
    opened.validate()
    say(stdout(), f"{store}: complete and intact ({opened.digest})")


@store_app.command("merge")
def store_merge(
    stores: Annotated[
        list[Path], typer.Argument(help="The store to finish, and others with more of its shards.")
    ],
) -> None:
    """Add up the shards of one collection, and finish the first store."""
    stdout().print(store_table(merging.merge(stores)))


@store_app.command("import-gblm")
def store_import_gblm(
    model: Model,
    store: Annotated[Path, typer.Argument(help="Folder to create.")],
    l1: Annotated[
        Path | None, typer.Option(help="gradients_aggregrate_norm_l1_model_*.pth")
    ] = None,
    l2: Annotated[
        Path | None, typer.Option(help="gradients_aggregrate_norm_l2_model_*.pth")
    ] = None,
    activations: Annotated[
        str | None, typer.Option(help="Store of the same model to take activations from.")
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Samples the reference summed over.")] = 128,
    scale: Annotated[float, typer.Option(help="What the reference scaled gradients by.")] = 100.0,
    overwrite: Overwrite = False,
) -> None:
    """Turn the gradient files of GBLM-Pruner's own code into a store."""
    config = importing.ImportConfig(
        model=model,
        store=store,
        l1=l1,
        l2=l2,
        activations=activations,
        num_samples=num_samples,
        scale=scale,
        overwrite=overwrite,
    )
    stdout().print(store_table(importing.import_gblm(config)))


def main() -> None:
    """Run `pipe`, and turn what went wrong into one line and an exit code."""
    codes: dict[type[Exception], int] = {InputError: 2, StoreError: 3, Interrupted: 75}
    prepare_streams()
    try:
        app()
    except SystemExit as error:
        if error.code == _TYPER_INTERRUPTED:
            complain("interrupted: run the same command again")
            sys.exit(75)
        raise
    except GradpipeError as error:
        complain(str(error))
        sys.exit(codes.get(type(error), 1))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            complain(f"{str(error.filename)[:40]}…: no file can have so long a name: give another")
            sys.exit(2)
        complain(str(error))
        sys.exit(1)


def _statistics(given: list[str], recipe: str | None) -> tuple[str, ...]:
    """The statistics asked for, one by one or by what a recipe reads."""
    if given:
        return tuple(name.strip() for names in given for name in names.split(","))
    return RECIPE_STATISTICS if recipe_options(recipe, {}) else DEFAULT_STATISTICS


def _data(
    name: str, config: str | None, split: str | None, revision: str | None, text_column: str
) -> DataConfig:
    return DataConfig(
        name=name, config=config, split=split, revision=revision, text_column=text_column
    )


def _shard(text: str | None) -> Shard | None:
    """The shard asked for, or the task of the Slurm array that this runs in."""
    return slurm_shard(os.environ) if text is None else Shard.parse(text)
