"""SIGINT and SIGTERM: while a run works, a request to save and stop; before it, an end at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None]
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether a signal has come; a second one quits at once.

    But for a second SIGTERM: Slurm may send it to all processes of a job, and torchrun, which is
    one of them, hands it on to its ranks.

    Off the main thread, where Python delivers no signals, nothing is changed.
    """
    come = set[int]()

    def handle(number: int, _: FrameType | None) -> None:
        if come and signal.SIGINT in {number, *come}:
            raise KeyboardInterrupt
        come.add(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    with _handled(handle):
        yield lambda: bool(come)


@contextmanager
def loading() -> Iterator[None]:
    """Libraries are imported inside; a signal ends that, even if a finaliser loses its exception.

    For the main thread alone.
    """
    asked = False

    def stop(_: int, __: FrameType | None) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    with _handled(stop):
        yield
    if asked:
        raise KeyboardInterrupt


@contextmanager
def _handled(handle: Handler) -> Iterator[None]:
    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
