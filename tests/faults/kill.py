"""Kill real runs of `pipe` at random instants, run them again, and compare every byte.

    python tests/faults/kill.py --kills 200 --seed 0

Each trial starts a command in a child forked from this process, which has imported everything
already, waits until it is in the phase that is the trial's, then for a random part of the time
that the phase takes, and sends SIGKILL. One trial in four kills the second run too. Then the same
command must end with the folder that an uninterrupted run leaves: the same names, the same bytes,
no stray file, in the output or beside it. Exit code 0 if all trials do.

The child tells its phase through one byte of shared memory, which wrapped functions set.
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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # its threads would not survive a fork
}
sys.path.insert(0, str(Path(__file__).parents[2]))  # runs as a file, too

import torch
import typer
from rich.console import Console

import gradpipe.cli
from gradpipe.store.objects import digest
from tests.support.cases import written
from tests.support.phases import PHASES

SETTINGS = ["--num-samples", "9", "--seq-len", "16", "--batch-size", "2"]
SECONDS_TO_HANG = 60.0

_NAMES = ("starting", *PHASES)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A command, what is there before it runs, and the phases to kill it in."""

    name: str
    arguments: Callable[[Path, Path], list[str]]  # of the inputs' folder and of the output's
    phases: tuple[str, ...]
    before: str | None = None  # an input folder that is copied to the output first


def _collect(*options: str) -> Callable[[Path, Path], list[str]]:
    def arguments(inputs: Path, out: Path) -> list[str]:
        source = ["collect-grads", str(inputs / "model"), str(out / "store")]
        return [*source, "--dataset", str(inputs / "text.txt"), *SETTINGS, *options]

    return arguments


def _prune(*options: str) -> Callable[[Path, Path], list[str]]:
    def arguments(inputs: Path, out: Path) -> list[str]:
        paths = [inputs / "model", inputs / "store", out / "pruned"]
        return ["prune", *map(str, paths), "--sparsity", "0.5", "--pattern", "2:4", *options]

    return arguments


SCENARIOS = (
    Scenario(
        "resident",
        _collect("--schedule", "resident", "--checkpoint-every", "2"),
        (
            *("tokenising", "beginning", "loading", "accumulating", "snapshotting"),
            *("finalising", "writing a layer", "committing", "tidying"),
        ),
    ),
    Scenario(
        "streamed",
        _collect("--schedule", "streamed", "--include", "lm_head"),
        (
            *("tokenising", "beginning", "streaming forward", "streaming the head"),
            *("streaming backward", "writing a layer", "committing", "tidying"),
        ),
    ),
    Scenario(
        "overwrite",
        _collect("--schedule", "resident", "--seed", "1", "--overwrite"),
        ("beginning", "accumulating", "finalising", "committing"),
        before="old",
    ),
    Scenario(
        "last shard",
        _collect("--shard", "1/2", "--finalize", "--checkpoint-every", "2"),
        ("accumulating", "snapshotting", "merging", "committing", "tidying"),
        before="shards",
    ),
    Scenario("prune", _prune(), ("pruning", "reporting", "publishing")),
    Scenario(
        "prune over", _prune("--overwrite"), ("pruning", "reporting", "publishing"), before="old"
    ),
    Scenario("prune a shard", _prune("--shard", "0/1"), ("pruning", "reporting", "publishing")),
    Scenario(
        "prune the last shard",
        _prune("--shard", "1/2"),
        ("pruning", "reporting", "publishing"),
        before="half",
    ),
)


class Bench:
    """Inputs, reference results, and children that run commands."""

    def __init__(self, folder: Path) -> None:
        """Make the inputs, and run every scenario once without a kill."""
        self.folder = folder
        self.inputs = folder / "inputs"
        self.phase = mmap.mmap(-1, 1)
        self.references: dict[str, dict[str, str]] = {}
        self.seconds: dict[tuple[str, str], list[float]] = {}  # of each visit to a phase
        written(self.inputs, max_shard_size="60KB")
        self._run_ok(_collect()(self.inputs, self.inputs))
        for name, arguments in {
            "old": _collect("--seed", "7")(self.inputs, self.inputs / "old"),
            "pruned": ["prune", *map(str, [self.inputs / "model", self.inputs / "store"])],
            "shards": _collect("--shard", "0/2")(self.inputs, self.inputs / "shards"),
            "half": _prune("--shard", "0/2")(self.inputs, self.inputs / "half"),
        }.items():
            more = [str(self.inputs / "old" / "pruned")] if name == "pruned" else []
            self._run_ok([*arguments, *more])
        for scenario in SCENARIOS:
            out = self.prepare(scenario, "reference")
            self._measure(scenario, out)
            self.references[scenario.name] = listing(out)
            shutil.rmtree(out)

    def prepare(self, scenario: Scenario, name: str) -> Path:
        """A folder as it is before the command."""
        out = self.folder / name
        out.mkdir()
        if scenario.before is not None:
            shutil.copytree(self.inputs / scenario.before, out, dirs_exist_ok=True)
        return out

    def start(self, arguments: list[str]) -> int:
        """The process id of a child that runs `pipe` with these arguments."""
        self.phase[0] = 0
        log = (self.folder / "log").open("wb")
        child = os.fork()
        if child:
            log.close()
            return child
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sys.argv = ["pipe", *arguments]
            for number, (owner, name) in enumerate(PHASES.values(), 1):
                setattr(owner, name, self._marked(getattr(owner, name), number))
            code = exit_code()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        except BaseException:  # noqa: BLE001 (nothing may return into the parent's code)
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(99)

    def _marked(self, function: Callable[..., Any], number: int) -> Callable[..., Any]:
        """`function`, which says that it is running."""

        @functools.wraps(function)
        def marked(*arguments: Any, **options: Any) -> Any:
            before = self.phase[0]
            self.phase[0] = number
            try:
                return function(*arguments, **options)
            finally:
                self.phase[0] = before

        return marked

    def _run_ok(self, arguments: list[str]) -> None:
        if code := self.wait(self.start(arguments)):
            raise RuntimeError(f"pipe {' '.join(arguments)} ended with {code}: {self.log()}")

    def wait(self, child: int) -> int:
        """The child's exit code; 98 if it hangs, and is killed for it."""
        deadline = time.monotonic() + SECONDS_TO_HANG
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return 98

    def log(self) -> str:
        """What the last child printed."""
        return (self.folder / "log").read_text(errors="replace").strip()

    def _measure(self, scenario: Scenario, out: Path) -> None:
        """Run the command whole, and note how long each visit to each phase takes."""
        child = self.start(scenario.arguments(self.inputs, out))
        phase, since = 0, time.monotonic()
        while not (done := os.waitpid(child, os.WNOHANG))[0]:
            if self.phase[0] != phase:
                visits = self.seconds.setdefault((scenario.name, _NAMES[phase]), [])
                visits.append(time.monotonic() - since)
                phase, since = self.phase[0], time.monotonic()
            time.sleep(0.0001)
        if code := os.waitstatus_to_exitcode(done[1]):
            raise RuntimeError(f"scenario {scenario.name} ended with {code}: {self.log()}")

    def kill(self, scenario: Scenario, out: Path, phase: str, generator: random.Random) -> str:
        """Run the command, and kill it in this phase; returns where it was, or `finished`."""
        visits = self.seconds.get((scenario.name, phase), [0.001])
        visit = generator.randrange(len(visits))
        pause = generator.random() * visits[visit]
        number, seen, before = _NAMES.index(phase), 0, 0
        child = self.start(scenario.arguments(self.inputs, out))
        while seen <= visit and not os.waitid(
            os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
        ):
            now = self.phase[0]
            seen += now == number != before
            before = now
            if seen <= visit:
                time.sleep(0.0001)
        time.sleep(pause)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code > 0 and not is_published(scenario, out):
            raise RuntimeError(f"ended with {code} before it was killed: {self.log()}")
        return _NAMES[self.phase[0]] if code < 0 else "finished"


def exit_code(run: Callable[[], None] = gradpipe.cli.main) -> int:
    """What `pipe` would end with, run in this process."""
    try:
        run()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


def is_published(scenario: Scenario, out: Path) -> bool:
    """True if a prune has made its output, which the same command would refuse to replace."""
    return scenario.name == "prune" and (out / "pruned").exists()


def listing(folder: Path) -> dict[str, str]:
    """Every path below the folder, hidden ones too, with the digest of what is in it."""
    return {
        path.relative_to(folder).as_posix(): digest(path.read_bytes()) if path.is_file() else "/"
        for path in folder.rglob("*")
    }


def difference(expected: Mapping[str, str], got: Mapping[str, str]) -> str:
    """What differs, in a few words; nothing if nothing does."""
    stray, missing = sorted(got.keys() - expected.keys()), sorted(expected.keys() - got.keys())
    changed = sorted(key for key in expected.keys() & got.keys() if expected[key] != got[key])
    lists = {"stray": stray, "missing": missing, "changed": changed}
    return "; ".join(f"{name} {keys[:4]}" for name, keys in lists.items() if keys)


def trial(bench: Bench, scenario: Scenario, phase: str, generator: random.Random) -> list[str]:
    """Kill, run again, compare; returns the phases of the kills. RuntimeError if they differ."""
    out = bench.prepare(scenario, "trial")
    kills = [bench.kill(scenario, out, phase, generator)]
    if generator.random() < 0.25 and not is_published(scenario, out):
        kills.append(bench.kill(scenario, out, generator.choice(scenario.phases), generator))
    for _ in range(1 if is_published(scenario, out) else 2):  # the last has nothing to do
        if is_published(scenario, out):
            break
        if code := bench.wait(bench.start(scenario.arguments(bench.inputs, out))):
            raise RuntimeError(f"the run after kills in {kills} ended with {code}: {bench.log()}")
    if odd := difference(bench.references[scenario.name], listing(out)):
        raise RuntimeError(f"after kills in {kills}: {odd}")
    shutil.rmtree(out)
    return kills


def _kills(counts: Mapping[tuple[str, str], int]) -> int:
    """How many runs were killed before they had finished."""
    return sum(count for (_, phase), count in counts.items() if phase != "finished")


def main(
    kills: Annotated[int, typer.Option(help="How many, at least.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the instants.")] = 0,
    only: Annotated[str | None, typer.Option(help="One scenario.")] = None,
) -> None:
    """Kill, run again, compare; print the kills by scenario and phase."""
    torch.set_num_threads(1)
    generator, console = random.Random(seed), Console(soft_wrap=True, highlight=False)
    scenarios = [scenario for scenario in SCENARIOS if only in {None, scenario.name}]
    cases = [(scenario, phase) for scenario in scenarios for phase in scenario.phases]
    counts: Counter[tuple[str, str]] = Counter()
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        generator.shuffle(cases)
        start, number = time.monotonic(), 0
        while _kills(counts) < kills:
            scenario, phase = cases[number % len(cases)]
            number += 1
            try:
                counts.update((scenario.name, p) for p in trial(bench, scenario, phase, generator))
            except RuntimeError as error:
                failures += 1
                counts[scenario.name, phase] += 1
                console.print(f"FAILED {scenario.name}, {phase}: {error}", markup=False)
                shutil.rmtree(bench.folder / "trial", ignore_errors=True)
        elapsed = time.monotonic() - start
    for (name, phase), count in sorted(counts.items()):
        console.print(f"{name:14} {phase:20} {count:4}")
    phases: Counter[str] = Counter()
    for (_, phase), count in counts.items():
        phases[phase] += count
    console.print(", ".join(f"{phase} {count}" for phase, count in sorted(phases.items())))
    console.print(f"{_kills(counts)} kills in {number} trials, {elapsed:.0f} s, {failures} failed")
    raise typer.Exit(min(failures, 1))


if __name__ == "__main__":
    typer.run(main)
