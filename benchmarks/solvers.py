"""What solving a layer costs, on one thread: SparseGPT against its published loop, ALPS against it.

    python benchmarks/solvers.py                             # about 2 minutes
    python benchmarks/solvers.py --repeats 5 --alps-repeats 2

Seconds are of the CPU, the least of repeats in turns; weights are random, second moments those of
random inputs of a decaying spectrum. The published loop is that of Frantar & Alistarh, 2023
(arXiv 2301.00774, algorithm 1): blocks of 128 columns, each column's error handed on to the rest of
its block at once, a sorted threshold for a block, or the lowest of every m columns. Neither side's
time holds the Cholesky factor, which both are given. ALPS and the recipe's ALPS under `kfac` are
timed with their decompositions, SparseGPT then with its factor, on the shapes of one block of a
Llama of 135 M parameters, for four targets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Annotated, Final

import torch
import typer
from torch import Tensor

from benchmarks.random_llama import heading, table
from gradpipe.stages.prune.alps import Alps
from gradpipe.stages.prune.curvature import Curvature
from gradpipe.stages.prune.score import LayerStatistics
from gradpipe.stages.prune.solver import LayerProblem, Solver
from gradpipe.stages.prune.sparsegpt import SparseGpt, sparsegpt
from gradpipe.stages.prune.target import Group, Pattern, Target

LARGE: Final = ((2048, 2048), (5632, 2048))
BLOCK: Final = {(576, 576): 2, (192, 576): 2, (1536, 576): 2, (576, 1536): 1}  # shape -> layers
TWO_OF_FOUR: Final = Pattern(2, 4)
TARGETS: Final = (Target(0.5), Target(0.6), Target(0.7), Target(0.5, TWO_OF_FOUR))
BLOCK_COLUMNS: Final = 128
SOLVERS: Final[Mapping[str, tuple[Callable[[LayerProblem], Solver], bool]]] = {
    "sparsegpt": (SparseGpt, False),
    "alps": (Alps, False),
    "alps, kfac": (Alps, True),
}  # class, and whether it is given outputs' second moments


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A random layer."""

    weight: Tensor  # (O, I)
    hessian: Tensor  # (I, I)
    cov: Tensor  # (O, O)

    @classmethod
    def random(cls, rows: int, columns: int, *, seed: int = 0) -> Problem:
        """The same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        weight = 0.02 * torch.randn(rows, columns, generator=generator)
        hessian, cov = (_second_moment(size, generator) for size in (columns, rows))
        return cls(weight=weight, hessian=hessian, cov=cov)

    def curvature(self, *, with_outputs: bool) -> Curvature:
        """Damped copies."""
        return Curvature.of(
            "layer", self.hessian.clone(), self.cov.clone() if with_outputs else None
        )


def _second_moment(size: int, generator: torch.Generator) -> Tensor:
    """Of correlated values whose sizes differ: eigenvalues fall over four decades."""
    values = torch.randn(2 * size, size, generator=generator) * torch.logspace(0, -2, size)
    rotation, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
    values = values @ rotation * torch.logspace(-0.5, 0.5, size)
    moment: Tensor = values.T @ values
    return moment


def published(
    weight: Tensor, factor: Tensor, sparsity: float, pattern: Pattern | None
) -> tuple[Tensor, Tensor]:
    """The loop as the paper has it, on a row-major weight (O, I); pruned, and its mask."""
    pruned, gone = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], BLOCK_COLUMNS):
        columns = slice(start, start + BLOCK_COLUMNS)
        block, lost, upper = pruned[:, columns].clone(), gone[:, columns], factor[columns, columns]
        costs = (block / upper.diagonal()).square()
        if pattern is None:
            lost[:] = costs <= costs.flatten().sort().values[int(costs.numel() * sparsity) - 1]
        errors = torch.zeros_like(block)
        for j in range(block.shape[1]):
            if pattern is not None and j % pattern.m == 0:
                ahead = slice(j, j + pattern.m)
                costs = (block[:, ahead] / upper.diagonal()[ahead]).square()
                lowest = costs.topk(pattern.m - pattern.n, dim=1, largest=False).indices
                lost[:, ahead].scatter_(1, lowest, value=True)
            kept = block[:, j].clone()
            kept[lost[:, j]] = 0
            errors[:, j] = (block[:, j] - kept) / upper[j, j]
            block[:, j:] -= errors[:, j, None] @ upper[None, j, j:]
            block[:, j] = kept
        pruned[:, columns] = block
        pruned[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
    return pruned, ~gone


def cpu_seconds(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The least of each side's CPU seconds; the sides take turns."""
    seconds = dict.fromkeys(sides, float("inf"))
    for _ in range(repeats):
        for name, side in sides.items():
            start = time.process_time()
            side()
            seconds[name] = min(seconds[name], time.process_time() - start)
    return seconds


def sparsegpt_rows(repeats: int) -> Iterator[list[str]]:
    """Of each large layer and target: both sides, how alike their masks and costs are."""
    for rows, columns in LARGE:
        problem = Problem.random(rows, columns)
        factor = problem.curvature(with_outputs=False).inverse_factor()
        for pattern in (None, TWO_OF_FOUR):
            yield [f"{rows} x {columns}", *_sparsegpt_row(problem, factor, pattern, repeats)]


def _sparsegpt_row(
    problem: Problem, factor: Tensor, pattern: Pattern | None, repeats: int
) -> list[str]:
    weight, half = problem.weight, Fraction(1, 2)
    seconds = cpu_seconds(
        {
            "published": lambda: published(weight, factor, float(half), pattern),
            "sparsegpt": lambda: sparsegpt(weight, factor, half, pattern),
        },
        repeats,
    )
    theirs, their_mask = published(weight, factor, float(half), pattern)
    ours, our_mask = sparsegpt(weight, factor, half, pattern)
    curvature = problem.curvature(with_outputs=False)
    costs = [
        float(((weight - x) * curvature.times(weight - x)).sum())
        for x in (ours * our_mask, theirs * their_mask)
    ]
    return [
        str(pattern or "50 %"),
        *(f"{value:.3f}" for value in seconds.values()),
        f"{seconds['sparsegpt'] / seconds['published']:.2f}",
        f"{100 * float((our_mask != their_mask).float().mean()):.4f} %",
        f"{costs[0] / costs[1] - 1:+.1e}",
    ]


def _published_block(problem: Problem) -> None:
    """What the published loop takes for four targets, its factor included."""
    factor = problem.curvature(with_outputs=False).inverse_factor()
    for target in TARGETS:
        published(problem.weight, factor, target.sparsity, target.pattern)


def alps_rows(repeats: int) -> Iterator[list[str]]:
    """Of each solver: a whole block, four targets, and its ratios to both SparseGPTs."""
    totals = dict.fromkeys(("published", *SOLVERS), 0.0)
    for (rows, columns), layers in BLOCK.items():
        problem = Problem.random(rows, columns)
        sides: dict[str, Callable[[], object]] = {"published": partial(_published_block, problem)}
        sides |= {name: _solving(problem, name) for name in SOLVERS}
        for name, seconds in cpu_seconds(sides, repeats).items():
            totals[name] += layers * seconds
    for name, seconds in totals.items():
        ratios = (f"{seconds / totals[base]:.1f}" for base in ("published", "sparsegpt"))
        yield [name, f"{seconds:.2f}", *ratios]


def _solving(problem: Problem, name: str) -> Callable[[], None]:
    make, with_outputs = SOLVERS[name]

    def solve() -> None:
        solver = make(
            LayerProblem(
                name="layer",
                weight=problem.weight,
                statistics=LayerStatistics(values={}, num_samples={}),
                damped=problem.curvature(with_outputs=with_outputs),
                group=Group.parse("layer"),
                budgets=tuple(target.budget for target in TARGETS),
            )
        )
        for target in TARGETS:
            solver.to(target.budget)

    return solve


def main(
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    alps_repeats: Annotated[int, typer.Option(min=1)] = 2,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Compare the solvers; print tables."""
    torch.set_num_threads(threads)
    layers = ["layer", "target", "published, s", "sparsegpt, s", "ratio", "masks differ", "cost"]
    large = table(layers, [*sparsegpt_rows(repeats)])
    block = table(
        ["one block, four targets", "s", "÷ published", "÷ sparsegpt"], [*alps_rows(alps_repeats)]
    )
    print("\n".join([heading("Solvers"), large, "", block]))


if __name__ == "__main__":
    typer.run(main)
