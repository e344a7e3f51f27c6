"""ALPS as published, ours and SparseGPT on layers of a real model: which leaves the least error.

    python benchmarks/alps.py MODEL STORE --include 'layers.(4|14|24).(self_attn.q|mlp.(up|down))_'

Each layer of STORE that matches is pruned from its own second moments of the inputs (`hessian`) by
three solvers: the published loop (`tests/support/published_alps.py`, float64, a minute for a wide
layer), ours under `--curvature input`, and `sparsegpt`. The table has each one's error
tr((W - W') H (W - W')ᵀ) as a share of the published one's, and how many places of the two masks of
ALPS are equal: the median over layers, least and most in brackets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Final

import torch
import typer
from torch import Tensor

from benchmarks.random_llama import heading, table
from gradpipe import GradientStore, open_store
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.prune.alps import Alps
from gradpipe.stages.prune.curvature import Curvature
from gradpipe.stages.prune.mask import budget_mask
from gradpipe.stages.prune.score import LayerStatistics
from gradpipe.stages.prune.solver import LayerProblem
from gradpipe.stages.prune.sparsegpt import sparsegpt
from gradpipe.stages.prune.target import Budget, Group, Pattern, Target
from gradpipe.store.schema import LayerSpec
from tests.support.published_alps import published_alps
from tests.support.reference_solvers import reference_cost

TARGETS: Final = (Target(0.5), Target(0.6), Target(0.7), Target(0.5, Pattern(2, 4)))
LAYER: Final = Group.parse("layer")


def compared(weight: Tensor, curvature: Curvature, budget: Budget) -> list[float]:
    """Errors of ours and of SparseGPT over the published one, and the share of equal places."""
    hessian = curvature.hessian.double()
    theirs, their_mask = published_alps(weight, hessian, lambda x: budget_mask(x, budget, LAYER))
    problem = LayerProblem(
        name="layer",
        weight=weight,
        statistics=LayerStatistics(values={}, num_samples={}),
        damped=curvature,
        group=LAYER,
        budgets=(budget,),
    )
    ours, our_mask = Alps(problem).to(budget)
    swept, swept_mask = sparsegpt(
        weight, curvature.inverse_factor(), budget.sparsity, budget.pattern
    )
    pairs = ((theirs, their_mask), (ours, our_mask), (swept, swept_mask))
    published, *others = (reference_cost(weight - x * kept, hessian) for x, kept in pairs)
    return [*(x / published for x in others), float((their_mask == our_mask).double().mean())]


def problems(model: str, store: GradientStore, include: str) -> Iterator[tuple[Tensor, Curvature]]:
    """Of each layer that matches: its weight in float32, and its damped Hessian."""
    checkpoint, device = Checkpoint.open(model), torch.device("cpu")
    for layer in store.spec.layers:
        if re.search(include, layer.name):
            encoded = store.read(layer, ("hessian",))
            values = LayerStatistics.decode(encoded, ("hessian",), device).values
            weight = _oriented(checkpoint.read(layer.weight_key), layer).float()
            yield weight, Curvature.of(layer.name, values["hessian"], None)


def _oriented(weight: Tensor, layer: LayerSpec) -> Tensor:
    return weight.T.contiguous() if layer.transposed else weight


def row(target: Target, figures: list[list[float]]) -> list[str]:
    """One target: each figure's median over layers, and its range."""
    columns = (sorted(column) for column in zip(*figures, strict=True))
    cells = (f"{median(x):.3f} ({x[0]:.3f} to {x[-1]:.3f})" for x in columns)
    return [str(target.pattern or f"{100 * target.sparsity:g} %"), *cells]


def main(
    model: Annotated[str, typer.Argument(help="The checkpoint that the store was made from.")],
    store: Annotated[Path, typer.Argument(help="A store with `hessian`.")],
    include: Annotated[str, typer.Option(help="Layers: a regular expression.")] = "",
) -> None:
    """Compare the three; print a table."""
    torch.set_num_threads(1)
    figures: dict[Target, list[list[float]]] = {target: [] for target in TARGETS}
    for weight, curvature in problems(model, open_store(store), include):
        for target, found in figures.items():
            found.append(compared(weight, curvature, target.budget))
    header = ["target", "ours ÷ published", "sparsegpt ÷ published", "equal places"]
    rows = [row(target, found) for target, found in figures.items()]
    print("\n".join([heading("ALPS against its publication"), table(header, rows)]))


if __name__ == "__main__":
    typer.run(main)
