"""A sweep: one model loaded once, pruned to each point of a grid in memory, and measured.

Nothing is written but a line for each point (`results.jsonl`), and checkpoints if they are asked
for. A point that has its line is not done again.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from gradpipe.errors import InputError
from gradpipe.pipeline.progress import QUIET, tell
from gradpipe.pipeline.prune.plan import PrunePlan
from gradpipe.pipeline.prune.run import open_store, prune, verify
from gradpipe.pipeline.ranks import Ranks
from gradpipe.pipeline.reports.points import PointResult
from gradpipe.pipeline.studies import STUDIES
from gradpipe.pipeline.sweep.bench import Bench, Task, at_alpha
from gradpipe.pipeline.sweep.board import Board
from gradpipe.pipeline.sweep.config import SweepConfig
from gradpipe.pipeline.sweep.grid import Grid
from gradpipe.pipeline.sweep.results import ResultsFile
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.device import own_torch
from gradpipe.store.lock import locked
from gradpipe.store.reader import GradientStore

CHECKPOINTS = "checkpoints"  # in OUT, with --keep


@own_torch()
def sweep(config: SweepConfig, console: Console = QUIET) -> tuple[PointResult, ...]:
    """Measure a model dense, and pruned to every point of a grid.

    The numbers are those of `prune` and `evaluate` one after the other. A call that was stopped
    goes on with the point that it was at; several processes may work on one grid as shards.

    Args:
        config: Which model, which grid, by which stores, and how each point is measured.
        console: Where progress goes; quiet unless given.

    Returns:
        What is known of the grid's points, in order, the dense model first: all of them, unless
        others of several shards are still at work.

    Raises:
        InputError: Model, stores, options or data do not fit together, or an option has a say in
            no point; nothing has been measured.
        StoreError: A store is incomplete or damaged.
        GradpipeError: A layer cannot be pruned so, or the disk fails.

    Example:
        >>> from pathlib import Path
        >>> from gradpipe import DataConfig, SweepConfig, sweep
        >>> config = SweepConfig(
        ...     model="embedded",
        ...     store="store",
        ...     out=Path("sweep"),
        ...     methods=("wanda", "gblm"),
        ...     data=DataConfig(name="stdlib"),
        ...     seq_len=256,
        ...     max_windows=2,
        ... )
        >>> [result.target for result in sweep(config)]
        ['dense', '50 %', '50 %']
    """
    grid = Grid.of(config)
    plans = _plans(config, grid)
    results = ResultsFile(config.out)
    local = (plan.store.local_folder for plan in plans)
    results.check((plans[0].checkpoint.folder, *(folder for folder in local if folder)))
    results.read()  # before what takes time
    if grid.left_out:
        tell(console, f"left out, as it has no say there: {', '.join(grid.left_out)}")
    for warning in dict.fromkeys(plan.warning for plan in plans if plan.warning):
        tell(console, warning)
    for plan in {plan.store.url: plan for plan in plans}.values():
        verify(plan, Ranks(), console)
    bench = Bench(config, plans, console)
    tasks = [bench.task(None, plans[0]), *map(bench.task, grid.points, plans)]
    _work(config, tasks, bench, results, console)
    found = results.read()
    return tuple(found[task.key] for task in tasks if task.key in found)


def _plans(config: SweepConfig, grid: Grid) -> list[PrunePlan]:
    """What each point will do: the same layers pruned in all, or one would be left in another.

    Raises InputError if model, stores and options do not fit together.
    """
    checkpoint = Checkpoint.open(config.model)
    configs = {point.config.store: point.config for point in grid.points}
    stores = {url: open_store(of_store) for url, of_store in configs.items()}
    _check_study(config, stores)
    plans = [PrunePlan.of(x.config, checkpoint, stores[x.config.store]) for x in grid.points]
    for plan in plans:
        if odd := sorted(plan.layers.keys() ^ plans[0].layers.keys()):
            raise InputError(
                f"stores {plans[0].store.url} and {plan.store.url} are of other layers, as "
                f"{odd[0]}: expected the same in all: leave one out, or name layers by --include"
            )
    return plans


def _work(
    config: SweepConfig,
    tasks: list[Task],
    bench: Bench,
    results: ResultsFile,
    console: Console,
) -> None:
    """Do what of this shard is not done."""
    own = tasks if config.shard is None else tasks[config.shard.index :: config.shard.count]
    with Board(console, columns_of(config), len(own)) as board:
        for task in own:
            found = results.read().get(task.key)
            if found is None:
                found = bench.do(task, board)
                results.append(found)
                board.add(found)
            else:
                board.show(found)
            if config.keep:
                _keep(config.out, task, found)


def columns_of(config: SweepConfig) -> str:
    """What the columns of its table are: a point's field."""
    return "target" if config.study is None else STUDIES[config.study].x


def _keep(out: Path, task: Task, result: PointResult) -> None:
    """Write a point's checkpoint, if it is not there: by `prune` itself."""
    if task.point is None or result.point is None:
        return
    if task.point.chooses_alpha:
        assert result.point.alpha is not None
        task = at_alpha(task, result.point.alpha)
    assert task.point is not None
    config = task.point.config
    method = "score" if config.score else config.recipe or config.method
    folder = out / CHECKPOINTS / f"{method}-{task.plan.targets[0].label}-{task.key[:8]}"
    if folder.exists():
        return
    with locked(folder.with_name(f".{folder.name}.keep"), of=folder, wait=True):
        if not folder.exists():  # another process may have written it meanwhile
            prune(replace(config, out=folder))


def _check_study(config: SweepConfig, stores: Mapping[str, GradientStore]) -> None:
    """Raises InputError if a store lacks what a study reads: all of it in one line."""
    if config.study is None:
        return
    for url, store in stores.items():
        lacking = [x for x in STUDIES[config.study].statistics if x not in store.spec.statistics]
        if lacking:
            wanted = ",".join(dict.fromkeys((*store.spec.statistics, *lacking)))
            raise InputError(
                f"store {url} lacks {', '.join(lacking)}, which --study {config.study} reads: "
                f"collect again with --statistics {wanted}"
            )
