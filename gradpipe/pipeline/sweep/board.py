"""What a sweep shows while it works: on a terminal a table that grows, elsewhere a line a point."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gradpipe.errors import printable
from gradpipe.options import words
from gradpipe.pipeline.progress import peak_memory, tell
from gradpipe.pipeline.reports.points import SAMPLES, PointResult, sweep_table


class Board:
    """The points that are done, and how far the one at work is."""

    def __init__(self, console: Console, x: str, total: int) -> None:
        """`total` points are to be done; `x` is what the table's columns are."""
        self._console = console
        self._x = x
        self._results: list[PointResult] = []
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}"),
            console=console,
        )
        self._points = self._progress.add_task("points", total=total, memory="")
        self._live = Live(
            console=console, get_renderable=self._render, transient=True, refresh_per_second=4
        )

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.quiet:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    @contextmanager
    def step(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """One step of the point at work; yields what hears of units done."""
        task = self._progress.add_task(printable(what), total=total, memory="")

        def advance(count: int) -> None:
            memory = f"peak {peak_memory() / 2**30:.2f} GiB"
            self._progress.update(task, advance=count, memory=memory)

        try:
            yield advance
        finally:
            self._progress.remove_task(task)

    def show(self, result: PointResult) -> None:
        """A point that was done before."""
        self._results.append(result)
        self._progress.advance(self._points)

    def add(self, result: PointResult) -> None:
        """A point that has just been done."""
        self.show(result)
        if not self._console.is_terminal:
            task = next(x for x in self._progress.tasks if x.id == self._points)
            line = f"{task.completed:.0f}/{task.total:.0f}  {named(result)}: {_found(result)}"
            tell(self._console, line)

    def _render(self) -> RenderableType:
        return Group(sweep_table(tuple(self._results), self._x), self._progress.get_renderable())


def named(result: PointResult) -> str:
    """A point by its options, as the command line has them."""
    if result.point is None:
        return "dense"
    options = {flag: x for flag, x in result.options.items() if flag != SAMPLES}
    return " ".join(w for f, x in options.items() if not isinstance(x, dict) for w in words(f, x))


def _found(result: PointResult) -> str:
    prune, evaluate = (result.seconds[x] for x in ("prune", "evaluate"))
    return (
        f"{result.metric.name} {result.metric.shown}  (pruned in {prune:.1f} s, measured in "
        f"{evaluate:.1f} s)"
    )
