"""Kill one of several ranks at random instants, see the others end, run again, compare every byte.

    python tests/faults/kill_ranks.py --times 60 --seed 0

Each trial forks the ranks of one command from this process, which has imported everything already,
waits until one of them is in the phase that is the trial's, then a random part of a moment, and
sends it SIGKILL, or in one trial of four SIGTERM. Every other rank must end by itself in time, with
75 and one line, or with 0 if the work was done. Then the same command must end with what an
uninterrupted run of as many ranks leaves: the same names, the same bytes, no stray file. After a
third of the kills under `streamed` another number of ranks goes on instead: the same
names, and sums that differ by the order of their addition alone. Exit code 0 if all trials hold.
"""

from __future__ import annotations

import functools
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # runs as a file, too

from tests.faults.kill import SETTINGS, difference, exit_code, listing  # first: it sets variables

# isort: split
import numpy as np
import torch
import typer
from rich.console import Console

from gradpipe import open_store
from gradpipe.__main__ import main as main_of_pipe
from tests.support.cases import written
from tests.support.phases import PHASES
from tests.support.ranked import free_port

RANKS = 3
SECONDS_TO_END = 20.0  # a rank alone would work on for less; one that waits would wait for more
_NAMES = ("starting", *PHASES)
_ON_FIRST = {"tokenising", "beginning", "committing", "tidying", "reporting", "publishing"}


@dataclass(frozen=True, slots=True)
class Scenario:
    """A command, and the phases to kill a rank in."""

    name: str
    options: tuple[str, ...]
    phases: tuple[str, ...]
    may_change_count: bool = False


SCENARIOS = (
    Scenario(
        "streamed",
        ("--schedule", "streamed", "--include", "lm_head", "--encoding", "float32"),
        (
            *("tokenising", "beginning", "recording calls", "streaming forward"),
            *("streaming the head", "streaming backward", "sending", "receiving"),
            *("writing a layer", "committing", "tidying"),
        ),
        may_change_count=True,
    ),
    Scenario(
        "resident",
        ("--schedule", "resident", "--checkpoint-every", "1", "--encoding", "float32"),
        (
            *("loading", "accumulating", "snapshotting", "finalising", "sending", "receiving"),
            *("writing a layer", "committing"),
        ),
    ),
    Scenario("prune", ("--sparsity", "0.5"), ("pruning", "reporting", "publishing")),
)


class Bench:
    """Inputs, reference results, and forked ranks."""

    def __init__(self, folder: Path) -> None:
        """Make the inputs, and run every scenario once without a kill."""
        self.folder = folder
        self.phases = mmap.mmap(-1, RANKS)
        self.visits = mmap.mmap(-1, RANKS * len(_NAMES))  # of each phase, by rank
        self.usual: dict[str, bytes] = {}  # the visits of an uninterrupted run
        self.references: dict[str, dict[str, str]] = {}
        written(folder)
        for scenario in SCENARIOS:
            out = folder / f"{scenario.name} reference"
            out.mkdir()
            if codes := [code for code, _ in self.ends(self.start(scenario, out, RANKS)) if code]:
                raise RuntimeError(f"{scenario.name} ended with {codes}: {self.said(0)}")
            self.references[scenario.name] = listing(out)
            self.usual[scenario.name] = self.visits[:]

    def arguments(self, scenario: Scenario, out: Path) -> list[str]:
        """The command of a scenario."""
        model = str(self.folder / "model")
        if scenario.name == "prune":
            store = self.folder / "streamed reference" / "store"
            return ["prune", model, str(store), str(out / "pruned"), *scenario.options]
        data = ["--dataset", str(self.folder / "text.txt")]
        return ["collect-grads", model, str(out / "store"), *data, *SETTINGS, *scenario.options]

    def start(self, scenario: Scenario, out: Path, count: int) -> list[int]:
        """Process ids of the ranks of a command."""
        arguments, port = self.arguments(scenario, out), str(free_port())
        self.phases[:], self.visits[:] = bytes(RANKS), bytes(RANKS * len(_NAMES))
        return [os.fork() or self._become(rank, count, port, arguments) for rank in range(count)]

    def _become(self, rank: int, count: int, port: str, arguments: list[str]) -> int:
        code = 99
        try:
            with (self.folder / f"log {rank}").open("wb") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            sys.argv = ["pipe", *arguments]
            for number, (owner, name) in enumerate(PHASES.values(), 1):
                setattr(owner, name, self._marked(getattr(owner, name), rank, number))
            code = exit_code(main_of_pipe)
        except BaseException:  # noqa: BLE001 (nothing may return into the parent's code)
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _marked(self, function: Callable[..., Any], rank: int, number: int) -> Callable[..., Any]:
        """`function`, which says that it is running."""

        @functools.wraps(function)
        def marked(*arguments: Any, **options: Any) -> Any:
            before, self.phases[rank] = self.phases[rank], number
            place = rank * len(_NAMES) + number
            self.visits[place] = min(self.visits[place] + 1, 255)
            try:
                return function(*arguments, **options)
            finally:
                self.phases[rank] = before

        return marked

    def said(self, rank: int) -> str:
        """What a rank printed, less the schedule."""
        text = (self.folder / f"log {rank}").read_text(errors="replace")
        lines = text.splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith("schedule "))

    def ends(self, ids: list[int]) -> list[tuple[int, float]]:
        """Each rank's exit code, 98 if it had to be killed, and the seconds until it ended."""
        start, found = time.monotonic(), dict[int, tuple[int, float]]()
        while len(found) < len(ids):
            seconds = time.monotonic() - start
            for pid in (pid for pid in ids if pid not in found):
                if seconds > SECONDS_TO_END:
                    os.kill(pid, signal.SIGKILL)
                done, status = os.waitpid(pid, 0 if seconds > SECONDS_TO_END else os.WNOHANG)
                if done:
                    code = os.waitstatus_to_exitcode(status)
                    found[pid] = (98 if seconds > SECONDS_TO_END else code, seconds)
            time.sleep(0.002)
        return [found[pid] for pid in ids]

    def kill(
        self, scenario: Scenario, out: Path, phase: str, generator: random.Random
    ) -> tuple[str, float]:
        """Run the command, kill a rank; where it was, and how long the others took to end."""
        victim = 0 if phase in _ON_FIRST else generator.randrange(RANKS)
        how = signal.SIGTERM if generator.random() < 0.25 else signal.SIGKILL
        place = victim * len(_NAMES) + _NAMES.index(phase)
        visit = generator.randint(1, max(self.usual[scenario.name][place], 1))
        pause = generator.random() * generator.choice((0.0, 0.001, 0.01))
        ids = self.start(scenario, out, RANKS)
        while self.visits[place] < visit and not os.waitid(
            os.P_PID, ids[victim], os.WEXITED | os.WNOHANG | os.WNOWAIT
        ):
            time.sleep(0.0001)
        time.sleep(pause)
        os.kill(ids[victim], how)
        was = _NAMES[self.phases[victim]]
        ends = self.ends(ids)
        for rank, (code, _) in enumerate(ends):
            allowed = {0, 75, -signal.SIGKILL} if rank == victim else {0, 75}
            said = self.said(rank)
            if code not in allowed or (code == 75 and said.count("\n") != 1):
                raise RuntimeError(f"rank {rank} of {victim} killed ended with {code}: {said}")
        is_done = all(code == 0 for code, _ in ends)
        return ("finished" if is_done else was), max(seconds for _, seconds in ends)


def is_near(one: Path, other: Path) -> bool:
    """The same norms, up to the order of additions in float32."""
    stores = [open_store(path / "store") for path in (one, other)]
    for layer in stores[0].spec.layers:
        for name in stores[0].spec.statistics:
            ours, theirs = (store.read_norms(layer, name) for store in stores)
            if not np.allclose(ours, theirs, rtol=1e-5, atol=1e-7):
                return False
    return True


def trial(
    bench: Bench, scenario: Scenario, phase: str, generator: random.Random
) -> tuple[str, float]:
    """Kill, run again, compare; RuntimeError if something is not as it must be."""
    out = bench.folder / "trial"
    out.mkdir()
    was, seconds = bench.kill(scenario, out, phase, generator)
    is_changed = scenario.may_change_count and generator.random() < 1 / 3
    count = generator.choice((1, 2)) if is_changed else RANKS
    is_published = scenario.name == "prune" and (out / "pruned").exists()
    codes = [code for code, _ in bench.ends(bench.start(scenario, out, count))]
    if codes != [2 if is_published else 0] * count:  # 2: OUT exists; a dead one's lock goes
        raise RuntimeError(f"after a kill in {was} {count} ranks: {codes}: {bench.said(0)}")
    expected, got = bench.references[scenario.name], listing(out)
    if count != RANKS:
        expected, got = dict.fromkeys(expected, ""), dict.fromkeys(got, "")
    odd = difference(expected, got)
    if not odd and count != RANKS and not is_near(out, bench.folder / "streamed reference"):
        odd = "other sums"
    if odd:
        raise RuntimeError(f"after a kill in {was}, {count} ranks: {odd}")
    shutil.rmtree(out)
    return was, seconds


def main(
    times: Annotated[int, typer.Option(help="How many kills, at least.")] = 60,
    seed: Annotated[int, typer.Option(help="Of the instants.")] = 0,
) -> None:
    """Kill, run again, compare; print the kills by scenario and phase."""
    torch.set_num_threads(1)
    generator, console = random.Random(seed), Console(soft_wrap=True, highlight=False)
    cases = [(scenario, phase) for scenario in SCENARIOS for phase in scenario.phases]
    generator.shuffle(cases)
    counts, failures, number, slowest = Counter[tuple[str, str]](), 0, 0, 0.0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        while sum(n for (_, was), n in counts.items() if was != "finished") < times:
            scenario, phase = cases[number % len(cases)]
            number += 1
            try:
                was, seconds = trial(bench, scenario, phase, generator)
                counts[scenario.name, was] += 1
                slowest = max(slowest, seconds)
                console.print(f"{number:4} {scenario.name}: {was}, others ended in {seconds:.2f} s")
            except RuntimeError as error:
                failures += 1
                counts[scenario.name, phase] += 1
                console.print(f"FAILED {scenario.name}, {phase}: {error}", markup=False)
                shutil.rmtree(bench.folder / "trial", ignore_errors=True)
    for (name, was), count in sorted(counts.items()):
        console.print(f"{name:10} {was:20} {count:4}")
    elapsed = time.monotonic() - start
    console.print(
        f"{number} trials, {elapsed:.0f} s; ranks ended within {slowest:.1f} s; {failures} failed"
    )
    raise typer.Exit(min(failures, 1))


if __name__ == "__main__":
    typer.run(main)
