"""GPU job (a): statistics, masks and solvers on a device against those of the CPU.

Tolerances. Statistics in float32: 1e-4 of a layer's norm, which is the order of sums. In bfloat16
both are held against the CPU's float32, and the device's may be twice as far from it as the CPU's
own bfloat16. Masks of the same scores, ties among them: equal. Solvers, whose choices hang on the
last bits: the cost of what they leave, within 1 %.

Shapes: O out, I in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_scale import Scale
from benchmarks.measures import Measure
from benchmarks.random_llama import write_checkpoint
from benchmarks.solvers import Problem
from gradpipe import CollectConfig, DataConfig, collect
from gradpipe.stages.prune.curvature import Curvature
from gradpipe.stages.prune.layer import SolvedLayer
from gradpipe.stages.prune.mask import budget_mask
from gradpipe.stages.prune.methods import METHODS, UPDATES, ChosenMethod, find_score
from gradpipe.stages.prune.score import LayerStatistics
from gradpipe.stages.prune.target import Budget, Group, Target, parse_targets
from gradpipe.store.statistics import STATISTICS, Sums

FLOAT32_TOLERANCE: Final = 1e-4
BFLOAT16_TIMES: Final = 2.0
COST_TOLERANCE: Final = 0.01
GROUPS: Final = ("output", "input", "layer", "output:8")
SOLVED: Final = (  # method, update, curvature
    ("sparsegpt", "none", "input"),
    ("alps", "none", "input"),
    ("alps", "none", "kfac"),
    ("magnitude", "obs", "input"),
    ("magnitude", "lsq", "kfac"),
)
Norms = Mapping[str, Mapping[str, Sums]]  # statistic -> layer -> values
CPU: Final = torch.device("cpu")


def measure(scale: Scale, device: torch.device, folder: Path) -> Iterator[Measure]:
    """All comparisons, each with its tolerance as the goal."""
    model = folder / "compared"
    write_checkpoint(model, scale.compared)
    exact, half = (norms(model, folder / f"cpu-{x}", CPU, x) for x in ("float32", "bfloat16"))
    ours, our_half = (
        norms(model, folder / f"device-{x}", device, x) for x in ("float32", "bfloat16")
    )
    yield from compared(ours, exact, "float32", dict.fromkeys(exact, FLOAT32_TOLERANCE))
    allowed = {
        name: FLOAT32_TOLERANCE + BFLOAT16_TIMES * distance(half[name], exact[name])
        for name in exact
    }
    yield from compared(our_half, exact, "bfloat16", allowed)
    yield from masks(scale.solved, device)
    yield from solvers(scale.solved, device)


def norms(model: Path, store: Path, device: torch.device, dtype: str) -> Norms:
    """Every statistic of every layer, collected on a device in a dtype."""
    collected = collect(
        CollectConfig(
            model=str(model),
            store=store,
            data=DataConfig(name="stdlib"),
            num_samples=4,
            seq_len=64,
            statistics=tuple(STATISTICS),
            encoding="float32",
            schedule="resident",
            device=str(device),
            dtype=dtype,
        )
    )
    layers = collected.spec.layers
    return {
        name: {x.name: collected.read_norms(x, name) for x in layers if name in x.own([name])}
        for name in STATISTICS
    }


def distance(got: Mapping[str, Sums], expected: Mapping[str, Sums]) -> float:
    """The largest over layers of ‖got − expected‖ ÷ ‖expected‖; infinite for a layer that lacks."""
    if got.keys() != expected.keys():
        return float("inf")
    return max(_relative(got[x], expected[x]) for x in expected)


def _relative(got: Sums, expected: Sums) -> float:
    return float(np.linalg.norm(got - expected)) / max(float(np.linalg.norm(expected)), 1e-30)


def compared(
    got: Norms, expected: Norms, dtype: str, allowed: Mapping[str, float]
) -> Iterator[Measure]:
    """How far each statistic is from the CPU's."""
    for name in expected:
        value = distance(got[name], expected[name])
        yield Measure(name=f"{name}, {dtype}", value=value, unit="relative", goal=allowed[name])


def masks(shape: tuple[int, int], device: torch.device) -> Iterator[Measure]:
    """How many weights differ between masks of the same scores, a third of them tied."""
    generator = torch.Generator().manual_seed(0)
    score_OI = torch.rand(shape, generator=generator)
    score_OI = score_OI.where(score_OI > 0.33, (8 * score_OI).round())
    chosen = [(Target(0.6).budget, Group.parse(group), group) for group in GROUPS]
    chosen += [
        (target.budget, Group.parse("output"), target.label)
        for target in parse_targets((), ("2:4", "4:8"))
    ]
    for budget, group, label in chosen:
        on_device = budget_mask(score_OI.to(device), budget, group).cpu()
        differing = int((on_device != budget_mask(score_OI, budget, group)).sum())
        yield Measure(name=f"mask, {label}", value=differing, unit="weights", goal=0)


def solvers(shape: tuple[int, int], device: torch.device) -> Iterator[Measure]:
    """How much more what a device's solver leaves costs than what the CPU's leaves."""
    problem = Problem.random(*shape)
    for (method, update, curvature), target in product(SOLVED, parse_targets((0.6,), ("2:4",))):
        chosen = chosen_method(method, update, curvature)
        costs = [
            cost(problem, solved(problem, chosen, target.budget, x), curvature)
            for x in (device, CPU)
        ]
        yield Measure(
            name=f"cost of {method}, {update}, {curvature}, {target.label}",
            value=abs(costs[0] / costs[1] - 1),
            unit="relative",
            goal=COST_TOLERANCE,
        )


def chosen_method(method: str, update: str = "none", curvature: str = "input") -> ChosenMethod:
    """A method with its choices made, comparing within its own group."""
    entry = METHODS[method]
    return ChosenMethod(
        method=entry,
        score=None if entry.formula is None else find_score(method, "l1", 100.0),
        update=UPDATES[update],
        curvature=curvature,
        group=Group.parse(entry.group),
    )


def solved(problem: Problem, chosen: ChosenMethod, budget: Budget, device: torch.device) -> Tensor:
    """A layer pruned on a device, (O, I), on the CPU."""
    moments = {"hessian": problem.hessian, "grad_cov": problem.cov}
    statistics = LayerStatistics(
        values={name: moments[name].clone().to(device) for name in chosen.second_moments},
        num_samples=dict.fromkeys(chosen.second_moments, 128),
    )
    layer = SolvedLayer.of(
        "layer", problem.weight.to(device), statistics, chosen, [budget], transposed=False
    )
    return layer.to(budget)


def cost(problem: Problem, pruned_OI: Tensor, curvature: str) -> float:
    """What the change costs, by second moments damped on the CPU."""
    damped = Curvature.of(
        "layer", problem.hessian.clone(), problem.cov.clone() if curvature == "kfac" else None
    )
    change_OI = problem.weight - pruned_OI
    return float((change_OI * damped.times(change_OI)).sum(dtype=torch.float64))
