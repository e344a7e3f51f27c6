"""GPU job (d): SparseGPT and the recipe's solver on one block of a LLaMA-2-7B, times its depth.

Second moments are made on the device: correlated inputs whose sizes fall over two decades. A layer
is timed from its second moments to its pruned weights on the host. The paper has 257 s for
SparseGPT on a LLaMA-2-7B (A100). The recipe's allocation, passes over scores, is not in it.

Shapes: N either width, T tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from benchmarks.gpu_agreement import chosen_method
from benchmarks.gpu_scale import Scale
from benchmarks.measures import Measure, forget_peak, peak_measure, seconds_of
from benchmarks.random_llama import LlamaSize
from gradpipe.pipeline.recipes import RECIPES
from gradpipe.stages.prune.layer import SolvedLayer
from gradpipe.stages.prune.methods import ChosenMethod
from gradpipe.stages.prune.score import LayerStatistics
from gradpipe.stages.prune.target import Target

PAPER: Final = "257 s, A100"
BUDGET: Final = Target(0.5).budget


def measure(scale: Scale, device: torch.device, folder: Path) -> Iterator[Measure]:
    """Seconds of each layer's shape, of the block, and of the model; nothing lies in `folder`."""
    del folder
    recipe = RECIPES["best"]
    solvers = {
        "sparsegpt": chosen_method("sparsegpt"),
        "recipe's solver": chosen_method(recipe.method, curvature=recipe.curvature),
    }
    shapes = block_shapes(scale.block)
    moments = {n: second_moment(n, device) for n in {n for shape in shapes for n in shape}}
    for label, chosen in solvers.items():
        block = 0.0
        forget_peak(device)
        for shape, count in shapes.items():
            taken = time_layer(shape, moments, chosen, device)
            block += count * taken
            name = f"{label}, {shape[0]} x {shape[1]}"
            yield Measure(name=name, value=taken, unit="s a layer")
        yield Measure(name=f"{label}, a block", value=block, unit="s")
        yield from peak_measure(label, device)
        before = PAPER if label == "sparsegpt" else ""
        whole = f"{label}, {scale.depth} blocks (extrapolated)"
        yield Measure(name=whole, value=scale.depth * block, unit="s", before=before)


def block_shapes(size: LlamaSize) -> Counter[tuple[int, int]]:
    """How many layers of each shape, (out, in), a block has."""
    wide, narrow = size.intermediate, size.hidden
    return Counter({(narrow, narrow): 4, (wide, narrow): 2, (narrow, wide): 1})


def second_moment(width: int, device: torch.device) -> Tensor:
    """Σ x xᵀ of 2 · width correlated values, (N, N)."""
    generator = torch.Generator(device).manual_seed(0)
    values_TN = torch.randn(2 * width, width, generator=generator, device=device)
    values_TN *= torch.logspace(0, -2, width, device=device)
    mixing_NN = torch.randn(width, width, generator=generator, device=device)
    values_TN = values_TN @ (mixing_NN / width**0.5)
    moment_NN: Tensor = values_TN.T @ values_TN
    return moment_NN


def time_layer(
    shape: tuple[int, int],
    moments: Mapping[int, Tensor],
    chosen: ChosenMethod,
    device: torch.device,
) -> float:
    """Seconds of one layer; its copies of the second moments are not counted."""
    ready = [problem_of(shape, moments, chosen, device) for _ in range(2)]
    return seconds_of(lambda: solve(*ready.pop(), chosen), device, repeats=1)


def problem_of(
    shape: tuple[int, int],
    moments: Mapping[int, Tensor],
    chosen: ChosenMethod,
    device: torch.device,
) -> tuple[Tensor, LayerStatistics]:
    """A random weight, and copies of its second moments, which are used up."""
    weight = torch.randn(shape, dtype=torch.bfloat16, device=device)
    given = {"hessian": moments[shape[1]], "grad_cov": moments[shape[0]]}
    values = {x: given[x].clone() for x in chosen.second_moments}
    return weight, LayerStatistics(values=values, num_samples=dict.fromkeys(values, 128))


def solve(weight_OI: Tensor, statistics: LayerStatistics, chosen: ChosenMethod) -> None:
    """One layer to one budget, and to the host."""
    layer = SolvedLayer.of("layer", weight_OI, statistics, chosen, [BUDGET], transposed=False)
    layer.to(BUDGET)
