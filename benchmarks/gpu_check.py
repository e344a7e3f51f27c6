"""Everything that only a GPU can show, in one run: one JSON file, and a table for the log.

    scripts/gpu_check.sh                                    # with the tests marked `gpu`
    python benchmarks/gpu_check.py OUT.json                 # under 6 minutes on one H100
    python benchmarks/gpu_check.py OUT.json --device cpu --scale toy

No network, and nothing is changed on the device but its memory. What a job has found is kept if a
later one fails; the exit code is 1 if one failed, or if results on the device are not the CPU's.
"""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Final

import torch
import typer

from benchmarks import gpu_agreement, gpu_collect, gpu_prune, gpu_solve, gpu_sparse
from benchmarks.gpu_scale import SCALES, Scale
from benchmarks.measures import Measure, measures_table, write_results
from benchmarks.random_llama import heading

Job = Callable[[Scale, torch.device, Path], Iterator[Measure]]
JOBS: Final[Mapping[str, Job]] = {
    "agreement": gpu_agreement.measure,
    "collect": gpu_collect.measure,
    "prune": gpu_prune.measure,
    "solve": gpu_solve.measure,
    "sparse": gpu_sparse.measure,
}
MUST_AGREE: Final = ("agreement", "sparse")  # their goals are correctness, of others speed


def run_job(name: str, scale: Scale, device: torch.device, folder: Path) -> Iterator[Measure]:
    """A job's figures, and last how long it took."""
    start = time.perf_counter()
    yield from JOBS[name](scale, device, folder)
    yield Measure(name="this job", value=time.perf_counter() - start, unit="s")


def disagreements(jobs: Mapping[str, list[Measure]]) -> list[str]:
    """What is not on the device as it is on the CPU."""
    return [x.name for name in MUST_AGREE for x in jobs.get(name, []) if x.is_met is False]


def main(
    out: Annotated[Path, typer.Argument(help="The JSON file to write.")],
    device: str = "cuda",
    scale: Annotated[str, typer.Option(help=", ".join(SCALES))] = "full",
    jobs: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(JOBS),
) -> None:
    """Run the jobs, one after the other; print tables."""
    print(heading(f"GPU check on {device}, {scale}"), flush=True)
    found: dict[str, list[Measure]] = {}
    errors: dict[str, str] = {}
    for name in jobs.split(","):
        found[name] = []
        try:
            with tempfile.TemporaryDirectory() as folder:
                for one in run_job(name, SCALES[scale], torch.device(device), Path(folder)):
                    found[name].append(one)
        except Exception as error:  # noqa: BLE001 - the other jobs must still run
            errors[name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        write_results(out, f"GPU check, {scale}", found, errors)
        print(f"\n## {name}\n\n{measures_table(found[name])}", flush=True)
    wrong = disagreements(found)
    print(f"\n{len(errors)} jobs failed; {len(wrong)} results are not the CPU's: {wrong}")
    raise typer.Exit(1 if errors or wrong else 0)


if __name__ == "__main__":
    typer.run(main)
