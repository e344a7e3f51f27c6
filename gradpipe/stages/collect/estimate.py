"""What a collection will take, from `config.json` alone: no weight is read, none is fetched.

The figures are estimates, on the safe side: weights and accumulators are exact, activations are
those that autograd and the hooks keep of each linear map, and a few of each block's width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradpipe.stages.model.layers import Layer, Skeleton
from gradpipe.store.schema import LayerSpec
from gradpipe.store.statistics import STATISTICS, needs_backward

_GROUPS = (Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))

_MARGIN = 1.2  # how much more than the estimate must be free

_BLOCK_WIDTHS = 12  # hidden-sized values that a block keeps beside its linear maps

METADATA_BYTES = 2560  # of each statistic of a layer: measured, with its part of the root's copy


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a collection runs, and what it needs."""

    schedule: str  # resident or streamed
    reason: str
    num_parameters: int
    resident_bytes: int  # on the device, if it ran resident
    streamed_bytes: int  # on the device, if it ran streamed
    free_bytes: int  # on the device, now
    host_bytes: int  # beside the device's: codes and files in flight
    scratch_bytes: int
    store_bytes: int
    read_bytes: int  # of weights
    flops: float

    @property
    def device_bytes(self) -> int:
        """What the chosen schedule needs on the device."""
        return self.resident_bytes if self.schedule == "resident" else self.streamed_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is collected."""

    num_samples: int
    seq_len: int
    batch_size: int
    statistics: tuple[str, ...]
    encoding: str


def make_plan(asked: str, skeleton: Skeleton, work: Workload, device: torch.device) -> Plan:
    """Plan a collection; `auto` is resident where that fits with margin."""
    model, blocks, layers = skeleton.model, skeleton.blocks, skeleton.layers
    size = model.dtype.itemsize
    total = sum(p.numel() for p in model.parameters())
    sizes = [sum(p.numel() for p in model.get_submodule(x).parameters()) for x in blocks.paths]
    inside, block = sum(sizes), max(sizes)
    sums = [_sum_bytes(x.spec, work.statistics) for x in layers]
    block_sums = max(
        sum(b for x, b in zip(layers, sums, strict=True) if x.spec.block == i)
        for i in range(blocks.count)
    )
    hidden, outputs = _widths(model, layers)
    tokens = work.batch_size * work.seq_len
    widths = max(
        sum(sum(x.spec.shape) for x in layers if x.spec.block == i) for i in range(blocks.count)
    )
    activations = tokens * size * (widths + _BLOCK_WIDTHS * hidden)
    head = tokens * outputs * (2 * size + 8)  # logits, and their float32 gradient
    resident = (total * size) + sum(sums) + activations * blocks.count + head
    streamed = max(
        block * size + block_sums + activations + 3 * tokens * hidden * size,
        (total - inside) * size + head + 3 * tokens * hidden * size,
    )
    free = free_bytes(device)
    schedule, reason = _choose(asked, resident, free)
    all_tokens = work.num_samples * work.seq_len
    backward = needs_backward(work.statistics)
    passes = (8 if schedule == "streamed" else 6) if backward else 2
    read = 2 * total if schedule == "resident" else 3 * total  # once for the digests
    depth = blocks.count
    return Plan(
        schedule=schedule,
        reason=reason,
        num_parameters=total,
        resident_bytes=resident,
        streamed_bytes=streamed,
        free_bytes=free,
        host_bytes=3 * max(4 * x.spec.num_weights for x in layers),
        scratch_bytes=(depth + 3) * all_tokens * hidden * size if schedule == "streamed" else 0,
        store_bytes=sum(_stored_bytes(x.spec, work) for x in layers),
        read_bytes=read * size,
        flops=float(passes) * total * all_tokens,
    )


def free_bytes(device: torch.device) -> int:
    """Free memory of the device: of the GPU, or what this machine, or its container, has left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = re.search(r"MemAvailable:\s+(\d+) kB", _text(Path("/proc/meminfo")))
    free = int(available[1]) * 1024 if available else 1 << 62
    return min([free, *_control_groups()])


def _control_groups() -> Iterator[int]:
    """What is left below each limit that this process, or a group that it is in, has."""
    own, root = _GROUPS
    for line in _text(own).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, names = root, ("memory.max", "memory.current")
        elif controllers == "memory":
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            limit, used = (_text(folder / name).strip() for name in names)
            if folder.is_relative_to(base) and limit.isdecimal() and used.isdecimal():
                yield max(int(limit) - int(used), 0)


def _choose(asked: str, resident: int, free: int) -> tuple[str, str]:
    if asked != "auto":
        return asked, "as asked"
    fits = resident * _MARGIN <= free
    needs = f"resident needs about {_gib(resident)}, {_gib(free)} are free"
    return ("resident" if fits else "streamed"), needs


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _text(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


def _widths(model: Any, layers: Sequence[Layer]) -> tuple[int, int]:
    """Of the hidden states, and of the logits."""
    embeddings = model.get_input_embeddings()
    if isinstance(embeddings, nn.Embedding):
        return embeddings.embedding_dim, embeddings.num_embeddings
    return layers[0].spec.shape[1], model.config.num_labels


def _sum_bytes(layer: LayerSpec, statistics: tuple[str, ...]) -> int:
    return sum(4 * math.prod(STATISTICS[x].sum_shape(layer.shape)) for x in layer.own(statistics))


def _stored_bytes(layer: LayerSpec, work: Workload) -> int:
    return int(
        sum(
            METADATA_BYTES + STATISTICS[name].stored_bytes(work.encoding, layer.shape)
            for name in layer.own(work.statistics)
        )
    )
