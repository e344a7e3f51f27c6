"""GPU job (c): stage two of a LLaMA-2-7B's worth of layers, against the bandwidth of a copy.

Random bfloat16 weights of 32 blocks, made on the device; statistics of one block, encoded as a
store keeps them, used for all. Per phase: codes to the device and decoded, score, select, zeros
written beside the weights. The paper (Das et al., 2023) has 404 ms for GBLM's metric and removal on
an A100, 257 ms for Wanda's. What the kernels take without the copies from the host is counted by
torch's profiler: that is what the goal is for. Last, layers as `prune` does them, back on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_agreement import chosen_method
from benchmarks.gpu_scale import Scale
from benchmarks.measures import DeviceClock, Measure, seconds_of, wait_for
from benchmarks.random_llama import write_checkpoint, write_store
from gradpipe import GradientStore
from gradpipe.stages.prune.decode import decode_norms
from gradpipe.stages.prune.layer import SolvedLayer
from gradpipe.stages.prune.mask import budget_mask
from gradpipe.stages.prune.methods import Score, find_score
from gradpipe.stages.prune.score import LayerStatistics, score_layer
from gradpipe.stages.prune.target import Budget, Group, parse_targets
from gradpipe.store.codec import Encoded

PAPER: Final = {"gblm": "404 ms, A100", "wanda": "257 ms, A100"}
GOAL_MS: Final = 40.0
COPIED_BYTES: Final = 1 << 30
ROWS: Final = Group.parse("output")
Layers = dict[str, tuple[list[Tensor], dict[str, Encoded]]]  # weights of all blocks, statistics


def measure(scale: Scale, device: torch.device, folder: Path) -> Iterator[Measure]:
    """Bandwidth, then each method and target by phase, for the whole model."""
    bandwidth = copy_bandwidth(device)
    yield Measure(name="copy on the device, read + write", value=bandwidth / 1e9, unit="GB/s")
    store = one_block(scale, folder)
    for method, target in product(("wanda", "gblm"), parse_targets((0.5,), ("2:4",))):
        score = find_score(method, "l1", 100.0)
        layers = layers_on(device, scale, store, score.statistics)
        label = f"{method}, {target.label}"
        clock = DeviceClock(device)
        pass_over(layers, score, target.budget, device, DeviceClock(device))  # to warm up
        pass_over(layers, score, target.budget, device, clock)
        phases = clock.milliseconds()
        for phase, taken in phases.items():
            yield Measure(name=f"{label}: {phase}", value=taken, unit="ms")
        yield Measure(name=f"{label}: all", value=sum(phases.values()), unit="ms")
        a_layer = sum(phases.values()) / sum(len(weights) for weights, _ in layers.values())
        yield Measure(name=f"{label}: a layer", value=a_layer, unit="ms")
        yield Measure(
            name=f"{label}: kernels alone",
            value=kernel_milliseconds(
                lambda: pass_over(layers, score, target.budget, device, DeviceClock(device)),  # noqa: B023
                device,
            ),
            unit="ms",
            goal=GOAL_MS,
            before=PAPER[method],
        )
        yield Measure(
            name=f"{label}: least, by its bytes", value=1e3 * moved(layers) / bandwidth, unit="ms"
        )
        whole = seconds_of(
            lambda: as_prune_does(layers, method, target.budget, device),  # noqa: B023
            device,
            repeats=1,
        )
        yield Measure(name=f"{label}: as `prune`, to the host", value=1e3 * whole, unit="ms")


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    size = COPIED_BYTES if device.type == "cuda" else COPIED_BYTES >> 6
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), device, repeats=5)


def one_block(scale: Scale, folder: Path) -> GradientStore:
    """A checkpoint of one block, `block` in the folder, and its store of random sums."""
    model, store = folder / "block", folder / "block-store"
    if not store.exists():
        write_checkpoint(model, scale.block)
        write_store(model, store)
    return GradientStore.open(store)


def layers_on(
    device: torch.device, scale: Scale, store: GradientStore, statistics: tuple[str, ...]
) -> Layers:
    """As many weights of each layer as the model has blocks, so that no cache keeps one."""
    return {
        layer.name: (
            [
                torch.randn(layer.shape, dtype=torch.bfloat16, device=device)
                for _ in range(scale.depth)
            ],
            store.read(layer, statistics),
        )
        for layer in store.spec.layers
    }


def pass_over(
    layers: Layers, score: Score, budget: Budget, device: torch.device, clock: DeviceClock
) -> None:
    """Prune all layers where they are."""
    for name, (weights, encoded) in layers.items():
        for weight_OI in weights:
            with clock("codes to the device, decoded"):
                values = {x: decode_norms(encoded, x, device) for x in score.statistics}
                counts = {x: encoded[x].spec.num_samples for x in score.statistics}
                statistics = LayerStatistics(values=values, num_samples=counts)
            with clock("score"):
                score_OI = score_layer(name, weight_OI, statistics, score)
            with clock("select"):
                mask_OI = budget_mask(score_OI, budget, ROWS)
            with clock("write back"):
                _ = weight_OI * mask_OI  # the weights must stay: zeros would tie in the next pass


def as_prune_does(layers: Layers, method: str, budget: Budget, device: torch.device) -> None:
    """Each layer once through the code of `pipe prune`: decoded, pruned, on the host again."""
    chosen = chosen_method(method)
    for name, (weights, encoded) in layers.items():
        for weight in weights:
            statistics = LayerStatistics.decode(encoded, chosen.statistics, device)
            layer = SolvedLayer.of(name, weight, statistics, chosen, [budget], transposed=False)
            layer.to(budget)


def kernel_milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """What the device's kernels take, without copies to and from the host; on a CPU, all."""
    if device.type == "cpu":
        return 1e3 * seconds_of(work, device, repeats=1)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        wait_for(device)
    events = [
        x for x in profiler.key_averages() if not x.key.startswith(("Memcpy HtoD", "Memcpy DtoH"))
    ]
    return float(sum(x.self_device_time_total for x in events)) / 1e3


def moved(layers: Layers) -> int:
    """The least bytes that can move: codes once, weights read and written."""
    return sum(
        len(weights) * (2 * weights[0].nbytes + sum(_nbytes(item) for item in encoded.values()))
        for weights, encoded in layers.values()
    )


def _nbytes(item: Encoded) -> int:
    return sum(part.nbytes for part in item.parts.values())
