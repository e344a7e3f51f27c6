"""One figure of a benchmark, how long work takes on a device, and the dated file of figures.

What: `Measure` is a row of every results file; `seconds_of` times work on a CPU or a GPU;
`write_results` writes `benchmarks/results/*.json`.
Why: the figures of `make bench` and of `scripts/gpu_check.sh` are read by the same eyes.
"""

from __future__ import annotations

import json
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch

from benchmarks.random_llama import MB, machine, peak_rss, table, versions

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One figure; a goal is what it may be at most."""

    name: str
    value: float
    unit: str  # s, ms, ×, MB, GB/s …
    goal: float | None = None
    before: str = ""  # what it was when the goal was set, as it was said then

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is met; None without one. NaN meets none."""
        return None if self.goal is None else self.value <= self.goal


def write_results(
    path: Path, title: str, jobs: Mapping[str, Sequence[Measure]], errors: Mapping[str, str]
) -> None:
    """Write all figures, and what became of jobs that failed, with date, machine and versions."""
    document = {
        "schema": SCHEMA,
        "title": title,
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "machine": machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(),
        "jobs": {
            name: [asdict(x) | {"is_met": x.is_met} for x in measures]
            for name, measures in jobs.items()
        },
        "errors": dict(errors),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def measures_table(measures: Sequence[Measure]) -> str:
    """What was measured, before, now, and the goal."""
    rows = [
        [x.name, x.before, f"{x.value:,.3g} {x.unit}", "" if x.goal is None else f"≤ {x.goal:,.3g}"]
        for x in measures
    ]
    return table(["what", "before", "now", "goal"], rows)


def wait_for(device: torch.device) -> None:
    """Let everything that a device has been told to do be done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Median seconds of `work`, waited for, after one call to warm up."""
    taken = []
    for _ in range(repeats + 1):
        wait_for(device)
        start = time.perf_counter()
        work()
        wait_for(device)
        taken.append(time.perf_counter() - start)
    return median(taken[1:])


def forget_peak(device: torch.device) -> None:
    """Count a GPU's peak anew, from what is held now; a counter of this process alone."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_measure(label: str, device: torch.device) -> Iterator[Measure]:
    """What tensors took on a GPU at most; a CPU's are not counted."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / MB
        yield Measure(name=f"{label}, peak", value=peak, unit="MB")


class DeviceClock:
    """Milliseconds by phase, of what a device does in order; no phase waits for another."""

    def __init__(self, device: torch.device) -> None:
        """Nothing measured."""
        self._device = device
        self._spans: list[tuple[str, Callable[[], float]]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time what happens within."""
        if self._device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._spans.append((phase, lambda: float(first.elapsed_time(last))))
        else:
            start = time.perf_counter()
            yield
            taken = 1e3 * (time.perf_counter() - start)
            self._spans.append((phase, lambda: taken))

    def milliseconds(self) -> dict[str, float]:
        """The sum of each phase."""
        wait_for(self._device)
        sums: dict[str, float] = {}
        for phase, read in self._spans:
            sums[phase] = sums.get(phase, 0.0) + read()
        return sums


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What some work took, in a process of its own."""

    cpu_seconds: float
    peak_bytes: int  # above the process as it was before
    written_bytes: int  # to files, as the process gave them to the system


def in_a_fork(work: Callable[[], object]) -> Cost:
    """Do `work` in a fork of this process, which has imported all that it needs.

    Raises ValueError if the work fails.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        before, peak, start = _written(), peak_rss(), time.process_time()
        work()
        sender.send((time.process_time() - start, peak_rss() - peak, _written() - before))

    process = context.Process(target=run)
    with warnings.catch_warnings():  # Python 3.12 warns wherever there are threads: these only wait
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    sender.close()
    try:
        taken, peak, written = receiver.recv()
    except EOFError:
        raise ValueError("the work failed in its process: see above") from None
    finally:
        process.join()
    return Cost(cpu_seconds=taken, peak_bytes=peak, written_bytes=written)


def _written() -> int:
    """Bytes that this process has written so far; Linux alone counts them."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("wchar:")).split()[1])
