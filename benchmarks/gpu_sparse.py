"""GPU job (e): products by 2:4 weights against dense ones, from a checkpoint pruned here.

One block of a LLaMA-7B is pruned to 2:4 by `prune`, and read back. On a GPU a weight becomes
`torch.sparse.to_sparse_semi_structured`; on a CPU, which has no such thing, a list of weights and
places, so that all else here runs there too. The paper quotes 1.54 to 1.63 times for these layers,
which is 0.61 to 0.65 of the dense time.

Shapes: T tokens, O out, I in.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.sparse import to_sparse_semi_structured

from benchmarks.gpu_prune import one_block
from benchmarks.gpu_scale import Scale
from benchmarks.measures import Measure, seconds_of
from gradpipe import PruneConfig, prune
from gradpipe.stages.checkpoint.folder import Checkpoint

LAYERS: Final = {
    "q, k, v, o": "self_attn.q_proj",
    "up, gate": "mlp.up_proj",
    "down": "mlp.down_proj",
}
PAPER: Final = "0.61 to 0.65 (1.54 to 1.63 × faster)"
TOLERANCE: Final = 0.02  # of bfloat16 products whose sums are in another order


def measure(scale: Scale, device: torch.device, folder: Path) -> Iterator[Measure]:
    """Sparse ÷ dense time of each kind of layer at each number of tokens; how far results are."""
    store = one_block(scale, folder)
    out = folder / "two-of-four"
    config = PruneConfig(
        model=str(folder / "block"),
        store=store.url,
        out=out,
        method="magnitude",
        patterns=("2:4",),
        device=str(device),
    )
    prune(config)
    checkpoint = Checkpoint.open(str(out))
    for label, layer in LAYERS.items():
        weight_OI = checkpoint.read(f"model.layers.0.{layer}.weight").to(device)
        check_two_of_four(weight_OI)
        yield from _products(label, weight_OI, scale, device)


def _products(
    label: str, weight_OI: Tensor, scale: Scale, device: torch.device
) -> Iterator[Measure]:
    sparse_OI = compressed(weight_OI)
    for tokens in scale.tokens:
        x_TI = torch.randn(tokens, weight_OI.shape[1], device=device).to(weight_OI.dtype)
        dense_TO, sparse_TO = linear(x_TI, weight_OI), linear(x_TI, sparse_OI)
        off = float((dense_TO.float() - sparse_TO.float()).norm() / dense_TO.float().norm())
        name = f"{label}, {tokens} tokens"
        yield Measure(name=f"{name}: distance", value=off, unit="relative", goal=TOLERANCE)
        seconds = [
            seconds_of(partial(_repeated, x_TI, weight), device, scale.repeats)
            for weight in (weight_OI, sparse_OI)
        ]
        yield Measure(name=f"{name}: dense", value=1e6 * seconds[0] / _CALLS, unit="µs")
        ratio = seconds[1] / seconds[0]
        yield Measure(name=f"{name}: 2:4 ÷ dense", value=ratio, unit="×", before=PAPER)


_CALLS: Final = 20  # in a row: one is shorter than what it takes to launch it


def _repeated(x_TI: Tensor, weight: Tensor) -> None:
    for _ in range(_CALLS):
        linear(x_TI, weight)


def compressed(weight_OI: Tensor) -> Tensor:
    """The weight without its zeros, as the device multiplies by it."""
    if weight_OI.is_cuda:
        sparse: Tensor = to_sparse_semi_structured(weight_OI)
        return sparse
    return weight_OI.to_sparse()


def check_two_of_four(weight_OI: Tensor) -> None:
    """Raises ValueError for a weight with more than two of four consecutive inputs."""
    kept = (weight_OI != 0).reshape(-1, 4).sum(dim=1)
    if int(kept.max()) > 2:
        raise ValueError("the pruned checkpoint is not 2:4")
