"""A block of code that may open only files of one folder, and may take little memory."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gradpipe.cli

PEAK_BYTES = 16 << 20


@dataclass(slots=True)
class Watch:
    """Files that were opened, while it is on."""

    paths: list[str] | None = None

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        """Hear of every file that Python opens."""
        if self.paths is not None and event == "open" and isinstance(arguments[0], str):
            self.paths.append(arguments[0])


WATCH = Watch()
sys.addaudithook(WATCH)  # a hook is for life: that is why it can be switched off


@contextmanager
def contained(folder: Path) -> Iterator[None]:
    """What runs in it opens no file but those below `folder`, and stays small in memory."""
    WATCH.paths = []
    tracemalloc.start()
    try:
        yield
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        paths, WATCH.paths = WATCH.paths, None
    code = (sys.prefix, sys.base_prefix, str(Path(gradpipe.cli.__file__).parent), "/proc", "/sys")
    odd = [path for path in paths if not path.startswith((str(folder), *code))]
    assert not odd
    assert peak < PEAK_BYTES
