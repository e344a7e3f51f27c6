"""What the largest layers cost: one block of a Llama of 7 B and of 70 B, SparseGPT and the recipe.

    python benchmarks/large.py                               # about 3 minutes of one core
    python benchmarks/large.py --divisors 8,4,2              # nearer, and 8 times as long

A block of a LLaMA-2-7B is solved with both widths divided, on one thread: each shape once, from its
second moments to its pruned weights. What takes time is products, decompositions and factors, of
O I (O + I), N³ and N³ operations, so that the block itself takes the cube of the divisor times as
long, memory its square. Each divisor says what the one before it would have said. Then the same
by operations, for a GPU: assumptions stand beside the numbers.

Shapes: O out, I in, N either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Final

import torch
import typer

from benchmarks.gpu_agreement import chosen_method
from benchmarks.gpu_scale import FULL
from benchmarks.gpu_solve import block_shapes, problem_of, second_moment, solve
from benchmarks.measures import Cost, in_a_fork
from benchmarks.random_llama import LlamaSize, heading, table
from gradpipe.pipeline.recipes import RECIPES
from gradpipe.stages.prune.methods import ChosenMethod

CPU: Final = torch.device("cpu")
RECIPE: Final = RECIPES["best"]
SOLVERS: Final = {
    "sparsegpt": chosen_method("sparsegpt"),
    "recipe's solver": chosen_method(RECIPE.method, curvature=RECIPE.curvature),
    "gblm, lsq, kfac": chosen_method("magnitude", "lsq", "kfac"),  # its update, whatever the score
}
BLOCKS: Final[Mapping[str, tuple[LlamaSize, int]]] = {  # a block, and how many the model has
    "7B": (FULL.block, 32),
    "70B": (replace(FULL.block, hidden=8192, intermediate=28672), 80),
    "405B": (replace(FULL.block, hidden=16384, intermediate=53248), 126),
}
STEPS: Final = {"admm": 18, "lsq": 30}  # the latter at most
PRODUCTS: Final = 25e12  # operations a second: float32 on an H100, 40 % of its 67 T
DECOMPOSED: Final = 1e12  # eigenvectors and factors: their first half waits for memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """Of one layer under `kfac`, for one target."""

    products: float
    decompositions: float

    @classmethod
    def of(cls, rows: int, columns: int) -> Operations:
        """Two changes of basis in each step of ADMM, one gradient in each of least squares."""
        product = 2.0 * rows * columns * (rows + columns)
        return cls(
            products=(2 * STEPS["admm"] + STEPS["lsq"]) * product,
            decompositions=9.0 * (rows**3 + columns**3),
        )


def solved(size: LlamaSize, chosen: ChosenMethod) -> tuple[float, int]:
    """CPU seconds of a block, and the peak of its largest layer in bytes."""
    shapes = block_shapes(size)
    moments = {n: second_moment(n, CPU) for n in {n for shape in shapes for n in shape}}
    costs: dict[tuple[int, int], Cost] = {}
    for shape in shapes:
        weight, statistics = problem_of(shape, moments, chosen, CPU)
        costs[shape] = in_a_fork(partial(solve, weight, statistics, chosen))
    seconds = sum(count * costs[shape].cpu_seconds for shape, count in shapes.items())
    return seconds, max(cost.peak_bytes for cost in costs.values())


def measured(divisors: Sequence[int]) -> Iterator[list[str]]:
    """Of each solver and divisor: what it took, what was predicted, and what it predicts."""
    full = FULL.block
    for name, chosen in SOLVERS.items():
        predicted = ""
        for divisor in divisors:
            size = replace(
                full, hidden=full.hidden // divisor, intermediate=full.intermediate // divisor
            )
            seconds, peak = solved(size, chosen)
            whole = seconds * divisor**3
            yield [
                f"{name}, ÷ {divisor}",
                f"{seconds:.1f}",
                predicted,
                f"{peak / 1e6:,.0f}",
                f"{whole / 60:,.0f}",
                f"{peak * divisor**2 / 1e9:,.1f}",
            ]
            following = next((x for x in divisors if x < divisor), divisor)
            predicted = f"{whole / following**3:.1f}"


def estimated() -> Iterator[list[str]]:
    """Of each model: operations of the recipe's solver, and what they take on a GPU."""
    for name, (size, depth) in BLOCKS.items():
        products = decompositions = 0.0
        for (rows, columns), count in block_shapes(size).items():
            one = Operations.of(rows, columns)
            products += count * one.products
            decompositions += count * one.decompositions
        seconds = products / PRODUCTS + decompositions / DECOMPOSED
        wide, narrow = size.intermediate, size.hidden
        memory = 4 * (4 * (wide**2 + narrow**2) + 10 * wide * narrow)
        yield [
            name,
            f"{products / 1e15:.2f}",
            f"{decompositions / 1e15:.2f}",
            f"{seconds:,.0f}",
            f"{depth * seconds / 3600:.1f}",
            f"{memory / 1e9:,.0f}",
        ]


def main(divisors: Annotated[str, typer.Option(help="Of both widths, falling.")] = "8,4") -> None:
    """Measure small blocks, predict large ones; print tables."""
    torch.set_num_threads(1)
    header = ["block of 7 B", "CPU s", "predicted", "peak, MB", "whole, min", "whole, GB"]
    print(heading("Large layers"))
    print(table(header, list(measured([int(x) for x in divisors.split(",")]))), "\n")
    header = ["recipe's solver, one target", "products, P", "decompositions, P",
              "a block, GPU s", "all blocks, GPU h", "peak, GB"]  # fmt: skip
    print(table(header, list(estimated())))


if __name__ == "__main__":
    typer.run(main)
