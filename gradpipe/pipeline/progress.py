"""Progress on a terminal: a bar with rates, time left and peak memory. Nothing elsewhere."""

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gradpipe.errors import printable

QUIET = Console(quiet=True)
T = TypeVar("T")


@contextmanager
def progress_bar(
    console: Console, title: str, total: int, unit: str, tokens_each: int = 0
) -> Iterator[Callable[[int], None]]:
    """A bar over `total` units; yields a function to call with the number of units just done.

    With `tokens_each`, tokens/s is shown too.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}"),
    )
    bar = Progress(*columns, console=console, disable=console.quiet or not console.is_terminal)
    start = time.monotonic()
    with bar:
        task = bar.add_task(title, total=total, rate="", memory="")

        def advance(count: int) -> None:
            """So many more are done."""
            bar.advance(task, count)
            done = bar.tasks[0].completed
            per_second = done / max(time.monotonic() - start, 1e-9)
            tokens = f", {per_second * tokens_each:,.0f} tokens/s" if tokens_each else ""
            rate = f"{per_second:.2f} {unit}/s{tokens}"
            bar.update(task, rate=rate, memory=f"peak {peak_memory() / 2**30:.2f} GiB")

        yield advance


def counted(items: Iterable[T], console: Console, title: str, total: int, unit: str) -> Iterator[T]:
    """The items, each counted by a bar as it is taken."""
    with progress_bar(console, title, total, unit) as advance:
        for item in items:
            yield item
            advance(1)


def tell(console: Console, line: str) -> None:
    """One line, however long, as it is: names in it are no markup."""
    console.print(printable(line), soft_wrap=True, markup=False, emoji=False, highlight=False)


def peak_memory() -> int:
    """Peak bytes so far: of the GPU once it has been used, else of this process."""
    torch = sys.modules.get("torch")  # what does not need it does not wait for it here
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
