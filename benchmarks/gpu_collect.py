"""GPU job (b): stage one against a bare forward and backward, resident and streamed.

A random Llama of about 1.3 B parameters in bfloat16. Bare: gradients of the weights that stage one
measures, each dropped between samples. Resident: the same model, hooks on. Streamed: all of the
schedule, reading every weight twice from files in the page cache, on more samples, as weights are
read once for all. Its copies overlap with compute as far as the schedule lets them: nothing is
added here.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_scale import Scale
from benchmarks.measures import Measure, forget_peak, peak_measure, seconds_of
from benchmarks.random_llama import STATISTICS, write_checkpoint
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.collect.resident import resident_batch
from gradpipe.stages.collect.streamed import Streamed
from gradpipe.stages.collect.sums import LayerAccumulator
from gradpipe.stages.model.batch import Batch
from gradpipe.stages.model.load import load_model, resolve_dtype
from gradpipe.stages.model.skeleton import Skeleton, take_apart

RESIDENT_GOAL = 1.05
STREAMED_GOAL = 1.36
MOMENTS_GOAL = 1.5  # with second moments


def measure(scale: Scale, device: torch.device, folder: Path) -> Iterator[Measure]:
    """Seconds a sample, ratios and peaks."""
    path = folder / "collected"
    write_checkpoint(path, scale.collected)
    checkpoint = Checkpoint.open(str(path))
    skeleton = take_apart(checkpoint, resolve_dtype("auto", checkpoint))
    bare = yield from _whole_model(scale, device, skeleton)
    yield from _streamed(scale, device, skeleton, bare, folder / "scratch")


def _whole_model(
    scale: Scale, device: torch.device, skeleton: Skeleton
) -> Generator[Measure, None, float]:
    """Bare, and resident with and without second moments; returns bare seconds a sample."""
    model = load_model(skeleton.checkpoint, skeleton.model.dtype, device)
    ids = samples(scale, scale.resident_samples)
    names = [f"{layer.path}.weight" for layer in skeleton.layers]
    bare = _a_sample(lambda: bare_pass(model, names, ids.to(device)), ids, scale, device)
    yield Measure(name="bare forward + backward", value=bare, unit="s a sample")
    for statistics, goal in ((STATISTICS, RESIDENT_GOAL), (_with_moments(), MOMENTS_GOAL)):
        forget_peak(device)
        sums = {x.path: LayerAccumulator(x.spec, statistics, device) for x in skeleton.layers}

        def hooked(sums: Any = sums) -> None:
            for one in ids.split(1):
                resident_batch(model, sums, Batch.of_tokens(one).to(device))

        taken = _a_sample(hooked, ids, scale, device)
        label = f"resident, {', '.join(statistics)}"
        yield Measure(name=f"{label} ÷ bare", value=taken / bare, unit="×", goal=goal)
        yield from peak_measure(label, device)
        del sums, hooked  # before the next ones are made
    return bare


def _streamed(
    scale: Scale, device: torch.device, skeleton: Skeleton, bare: float, scratch: Path
) -> Iterator[Measure]:
    ids = samples(scale, scale.streamed_samples)
    count = iter(range(1000))

    def run() -> None:
        batch = Batch.of_tokens(ids)
        folder = scratch / str(next(count))
        schedule = Streamed(skeleton, STATISTICS, batch, 1, device, folder)
        for _ in schedule.run(frozenset(), lambda _: None):
            pass

    forget_peak(device)
    taken = seconds_of(run, device, repeats=1) / len(ids)
    yield Measure(name="streamed ÷ bare", value=taken / bare, unit="×", goal=STREAMED_GOAL)
    yield from peak_measure("streamed", device)


def bare_pass(model: Any, names: list[str], ids_BT: Tensor) -> None:
    """Ordinary gradients of some weights, sample by sample, dropped at once."""
    weights = [model.get_parameter(name).requires_grad_() for name in names]
    for ids_1T in ids_BT.split(1):
        model(input_ids=ids_1T, labels=ids_1T, use_cache=False).loss.backward()
        for weight in weights:
            weight.grad = None
    for weight in weights:
        weight.requires_grad_(False)  # noqa: FBT003 - torch's own signature


def samples(scale: Scale, count: int) -> Tensor:
    """Random tokens, the same for the same count."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(scale.collected.vocab, (count, scale.seq_len), generator=generator)


def _a_sample(work: Any, ids: Tensor, scale: Scale, device: torch.device) -> float:
    return seconds_of(work, device, scale.repeats) / len(ids)


def _with_moments() -> tuple[str, ...]:
    return (*STATISTICS, "hessian", "grad_cov")
