"""The command `pipe`: options to configs, one call, errors to exit codes. Nothing else.

A command is a function of a config, whose fields are its options. What does the work is imported
once the options are right and model and store are there: torch takes seconds. Data goes to stdout,
progress and errors to stderr. Exit codes: 0 done; 1 a failure; 2 the user's mistake; 3 the store is
incomplete or damaged; 75 interrupted, run again to go on.
"""

# ruff: noqa: PLC0415 (imports stand where they are paid for)
import dataclasses
import errno
import sys
from pathlib import Path
from typing import Annotated

import typer

from gradpipe.errors import GradpipeError, InputError, Interrupted, StoreError
from gradpipe.help import Group
from gradpipe.options import Option
from gradpipe.pipeline.collect.config import CollectConfig, ImportConfig
from gradpipe.pipeline.evaluate_config import EvalConfig, EvalExtras
from gradpipe.pipeline.interrupt import loading
from gradpipe.pipeline.options import Model, Overwrite
from gradpipe.pipeline.prune.config import PruneConfig
from gradpipe.pipeline.publish import PushConfig
from gradpipe.pipeline.report_config import ReportConfig
from gradpipe.pipeline.stores.config import CopyConfig, ExportConfig, StatsConfig, Store
from gradpipe.pipeline.sweep.config import SweepConfig
from gradpipe.signatures import command
from gradpipe.stages.checkpoint.place import locate
from gradpipe.terminal import Json, Output, complain, prepare_streams, say, stderr, stdout

_TYPER_INTERRUPTED = 130  # what typer makes of a KeyboardInterrupt
_WIDE = 10_000  # columns of a file: tables wrap on terminals alone
_NO_EXTRAS, _NO_PUSH = EvalExtras(), PushConfig()

app = typer.Typer(
    name="pipe",
    cls=Group,
    help="One-shot pruning of language models from gradients: collect once, prune many times.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it would eat [default: …]
)
store_app = typer.Typer(
    cls=Group, help="Look at, check and import gradient stores.", no_args_is_help=True
)
app.add_typer(store_app, name="store")
mask_app = typer.Typer(
    cls=Group, help="Masks of a pruned checkpoint, on their own.", no_args_is_help=True
)
app.add_typer(mask_app, name="mask")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"pipe {version('gradpipe')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version, and stop.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """The options of `pipe` itself."""


@command(app)
def collect_grads(
    config: CollectConfig,
    dry_run: Annotated[bool, Option(help="Print what it would take, and stop.")] = False,
) -> None:
    """Stage one: stream calibration samples through a model and write a gradient store."""
    locate(config.model)
    with loading():
        from gradpipe.pipeline.collect import run as collecting
        from gradpipe.pipeline.reports.tables import plan_table, store_table

    if dry_run:
        stdout().print(plan_table(collecting.examine(config)))
        return
    collect = collecting.collect if config.shard is None else collecting.collect_shard
    result = collect(config, stderr())
    if result is not None:
        stdout().print(store_table(result))
        return
    assert config.shard is not None
    done = f"shard {config.shard.index}/{config.shard.count} is done"
    say(stderr(), f"{done}: merge with pipe store merge {config.store}")


@command(app)
def prune(
    config: PruneConfig,
    verbose: Annotated[bool, Option(help="Print each layer.")] = False,
    to_hub: PushConfig = _NO_PUSH,
) -> None:
    """Stage two: sparsify a checkpoint from a store, without running the model."""
    to_hub.check()
    locate(config.model)
    _check_store(config.store)
    with loading():
        from gradpipe.pipeline.places import REPORT
        from gradpipe.pipeline.prune import run as pruning
        from gradpipe.pipeline.reports.tables import layer_table, prune_table

    results = pruning.prune(config, stderr())
    if not results:
        say(stderr(), "this shard is done; the one that completes the files publishes OUT")
        return
    for result in results if verbose else ():
        stdout().print(layer_table(result))
    stdout().print(prune_table(f"{config.out}", results))
    say(stdout(), f"each layer: --verbose, or {REPORT}; as a page: pipe report {config.out}")
    _push(to_hub, {result.label: result.folder for result in results})


@command(app, "eval")
def evaluate(
    config: EvalConfig,
    more: Annotated[tuple[str, ...], Option(help="On the same text.", is_argument=True)] = (),
    extras: EvalExtras = _NO_EXTRAS,
    to_hub: PushConfig = _NO_PUSH,
    json_file: Json = None,
) -> None:
    """Perplexity of checkpoints, on windows that do not overlap; of images, top-1 accuracy."""
    output = Output(json_file)
    to_hub.check()
    if to_hub.push_to_hub is not None and not extras.card:
        raise InputError("--push-to-hub: expected --card too: else nothing here is new")
    models = (config.model, *more)
    for name in (*models, extras.compare):
        if name is not None:
            locate(name)
    with loading():
        from gradpipe.pipeline import compare as comparing
        from gradpipe.pipeline.reports.evaluations import to_json, to_lines

    found = comparing.compare(models, config, extras, stderr())
    output.show(to_json(found), to_lines(models, found))
    _push(to_hub, {name.strip("./").replace("/", "-"): Path(name) for name in models})


@command(app)
def verify(
    model: Model,
    base: Annotated[
        str | None, Option(help="The dense model that it was made from: compare what was kept.")
    ] = None,
) -> None:
    """Hold a pruned checkpoint against its pruning.json; exit 1 if a tensor is otherwise."""
    for name in (model, base):
        if name is not None:
            locate(name)
    with loading():
        from gradpipe.pipeline import verify as verifying

    say(stdout(), verifying.verify(model, base, stderr()).summary)


@command(app)
def report(config: ReportConfig) -> None:
    """One page of what was pruned, swept or collected: curves, tables, masks, provenance."""
    if config.model is not None:
        locate(config.model)
    with loading():
        from gradpipe.pipeline import report as reporting

    written = reporting.report(config, stderr())
    if config.format == "html":
        say(stdout(), f"report: {written}")
    else:
        sys.stdout.write(written)


@command(app)
def sweep(config: SweepConfig) -> None:
    """A grid of prunings, each measured: the model is loaded once, and no checkpoint is written."""
    locate(config.model)
    for store in config.stores:
        _check_store(store)
    with loading():
        from gradpipe.pipeline.reports.points import sweep_table
        from gradpipe.pipeline.sweep import run as sweeping

    results, console = sweeping.sweep(config, stderr()), stdout()
    table = sweep_table(results, sweeping.columns_of(config), plain=not console.is_terminal)
    console.print(table, width=None if console.is_terminal else _WIDE, crop=False)


@command(app)
def doctor(
    model: Annotated[
        str | None,
        Option(help="Model directory, Hub id, or `embedded`; no weight is read.", is_argument=True),
    ] = None,
    json_file: Json = None,
) -> None:
    """Versions, devices, free memory and disk; of a model its blocks, layers, and what is dense."""
    output = Output(json_file)
    if model is not None:
        locate(model)
    with loading():
        from gradpipe.pipeline import doctor as diagnosing
        from gradpipe.pipeline.reports.tables import health_table

    health = diagnosing.diagnose(model)
    output.show(dataclasses.asdict(health), health_table(health))


@command(app)
def demo(
    out: Annotated[Path, Option(help="Folder to create.", is_argument=True)] = Path(
        "gradpipe-demo"
    ),
) -> None:
    """The whole of it on the embedded model: collect, prune with every method, compare."""
    with loading():
        from gradpipe.pipeline import demo as demonstrating
        from gradpipe.pipeline.reports.tables import demo_table

    result = demonstrating.demo(out, stderr())
    stdout().print(demo_table(result))
    say(stdout(), f"store and checkpoints: {result.folder}")


@command(mask_app, "export")
def mask_export(
    model: Model, masks: Annotated[Path, Option(help="File to create.", is_argument=True)]
) -> None:
    """Write where a pruned checkpoint's layers are not zero: one bit a weight."""
    locate(model)
    with loading():
        from gradpipe.pipeline import masks as masking

    say(stdout(), f"{masks}: masks of {masking.export_masks(model, masks)} layers")


@command(mask_app, "apply")
def mask_apply(
    model: Model,
    masks: Annotated[Path, Option(help="What export wrote.", is_argument=True)],
    out: Annotated[Path, Option(help="Folder to create.", is_argument=True)],
    overwrite: Overwrite = False,
) -> None:
    """Give a fine-tuned checkpoint its zeros back."""
    locate(model)
    with loading():
        from gradpipe.pipeline import masks as masking
        from gradpipe.pipeline.reports.tables import prune_table

    done = masking.apply_masks(model, masks, out, overwrite=overwrite, console=stderr())
    stdout().print(prune_table(f"{out}", [done]))


@command(store_app, "info")
def store_info(store: Store, json_file: Json = None) -> None:
    """What a store holds, and of what."""
    output = Output(json_file)
    from gradpipe.pipeline.reports.tables import store_table
    from gradpipe.store.reader import GradientStore

    opened = GradientStore.open(store)
    document = {**opened.spec.to_json(), "digest": opened.digest, "bytes": opened.sizes()}
    output.show(document, store_table(opened))


@command(store_app, "verify")
def store_verify(store: Store) -> None:
    """Read every object of a store and check it; exit 3 if one is damaged."""
    from gradpipe.store.reader import GradientStore

    opened = GradientStore.open(store)
    opened.validate()
    say(stdout(), f"{opened.url}: complete and intact ({opened.digest})")


@command(store_app, "copy")
def store_copy(config: CopyConfig) -> None:
    """Copy a store to or from a folder, a bucket or the Hub; run again, it goes on."""
    with loading():
        from gradpipe.pipeline.stores import copy as copying

    copied = copying.copy(config, stderr())
    say(stdout(), f"{copied.url}: complete and intact ({copied.digest})")


@command(store_app, "export")
def store_export(config: ExportConfig) -> None:
    """Write statistics for other tools: llama.cpp's importance matrix, or decoded norms."""
    with loading():
        from gradpipe.pipeline.stores import export as exporting

    say(stdout(), f"{exporting.export(config)}: {config.format}")


@command(store_app, "stats")
def store_stats(config: StatsConfig, json_file: Json = None) -> None:
    """Norms, outliers, effective ranks, dead inputs and unseen experts, by layer and block."""
    output = Output(json_file)
    with loading():
        from gradpipe.pipeline.reports.tables import stats_table
        from gradpipe.pipeline.stores import stats as describing

    found = describing.stats(config, stderr())
    output.show(found.to_json(), stats_table(found))


@command(store_app, "merge")
def store_merge(
    stores: Annotated[
        tuple[Path, ...],
        Option(help="The store to finish, and others with more of its shards.", is_argument=True),
    ],
) -> None:
    """Add up the shards of one collection, and finish the first store."""
    with loading():
        from gradpipe.pipeline.collect import merge as merging
        from gradpipe.pipeline.reports.tables import store_table

    stdout().print(store_table(merging.merge(list(stores))))


@command(store_app, "import-gblm")
def store_import_gblm(config: ImportConfig) -> None:
    """Turn the gradient files of GBLM-Pruner's own code into a store."""
    locate(config.model)
    if config.activations is not None:
        _check_store(config.activations)
    with loading():
        from gradpipe.pipeline.collect import import_gblm as importing
        from gradpipe.pipeline.reports.tables import store_table

    stdout().print(store_table(importing.import_gblm(config)))


def _push(config: PushConfig, folders: dict[str, Path]) -> None:
    """Upload what was written, if that was asked for."""
    from gradpipe.pipeline.publish import push

    for repository, folder in config.repositories(folders).items():
        say(stderr(), f"uploaded to {push(repository, folder, private=config.private)}")


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
        if not error.is_told:
            complain(str(error))
        sys.exit(codes.get(type(error), 1))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            complain(f"{str(error.filename)[:40]}…: no file can have so long a name: give another")
            sys.exit(2)
        complain(str(error))
        sys.exit(1)


def _check_store(store: str) -> None:
    """Raises what opening it would, before torch is imported, if it is not there."""
    from gradpipe.store.reader import GradientStore

    if "://" not in store:  # a remote one is asked but once
        GradientStore.open(store)
