"""What a collection will take, from `config.json` alone: no weight is read, none is fetched.

The figures are estimates, on the safe side: weights and accumulators are exact, activations are
those that autograd and the hooks keep of each linear map, and a few of each block's width.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradpipe.stages.device import usable_threads
from gradpipe.stages.model.blocks import num_parameters
from gradpipe.stages.model.layers import Layer
from gradpipe.stages.model.skeleton import Skeleton
from gradpipe.store.schema import LayerSpec
from gradpipe.store.statistics import STATISTICS, needs_backward

_GROUPS = (Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
_MARGIN = 1.2  # how much more than the estimate must be free
_BLOCK_WIDTHS = 12  # hidden-sized values that a block keeps beside its linear maps
_HOST_COPIES = 3  # of the largest layer's sums: on the host, encoded, as a file
METADATA_BYTES = 2560  # of each statistic of a layer: measured, with its part of the root's copy


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One device's of a resident model that is spread over several."""

    needed_bytes: int
    free_bytes: int  # now


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
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
    threads: int  # of the CPU, for one operation
    shares: Mapping[str, Share] = field(default_factory=dict)  # of a spread model, by device

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


def estimate(
    asked: str, skeleton: Skeleton, work: Workload, device: torch.device, processes: int = 1
) -> Estimate:
    """What a collection takes; `auto` is resident where that fits with margin.

    The memory is shared by so many `processes`, each with a model of its own.
    """
    model, blocks, layers = skeleton.model, skeleton.blocks, skeleton.layers
    itemsize = model.dtype.itemsize  # bytes of a weight, and of a value between layers
    tokens, all_tokens = work.batch_size * work.seq_len, work.num_samples * work.seq_len
    parameters = num_parameters(model)
    inside = [num_parameters(model.get_submodule(path)) for path in blocks.paths]
    sums = [(x.spec.block, sum_bytes(x.spec, work.statistics)) for x in layers]
    hidden, _ = _widths(model, layers)
    graph, head = _graph_bytes(skeleton, work), _head_bytes(skeleton, work)
    all_sums = sum(size for _, size in sums)
    resident = parameters * itemsize + all_sums + graph * blocks.count + head

    # A block with its sums, or what is outside the blocks; what passes: in, out, a gradient.
    block = max(inside) * itemsize + _largest(sums, blocks.count) + graph
    outside = (parameters - sum(inside)) * itemsize + head
    streamed = max(block, outside) + 3 * tokens * hidden * itemsize

    free = free_bytes(device) // processes
    schedule, reason = _choose(asked, resident, free)
    is_streamed = schedule == "streamed"
    backward = 6 if is_streamed else 4  # streamed, the graph is computed again
    per_weight = 2 + (backward if needs_backward(work.statistics) else 0)
    kept = (blocks.count + 3) * all_tokens * hidden * itemsize  # inputs, and two gradients
    return Estimate(
        schedule=schedule,
        reason=reason,
        num_parameters=parameters,
        resident_bytes=resident,
        streamed_bytes=streamed,
        free_bytes=free,
        host_bytes=_HOST_COPIES * max(4 * layer.spec.num_weights for layer in layers),
        scratch_bytes=kept if is_streamed else 0,
        store_bytes=sum(_stored_bytes(layer.spec, work) for layer in layers),
        read_bytes=(3 if is_streamed else 2) * parameters * itemsize,  # once for the digests
        flops=float(per_weight) * parameters * all_tokens,
        threads=usable_threads(),
    )


def spread(
    planned: Estimate, skeleton: Skeleton, work: Workload, device_of: Callable[[str], torch.device]
) -> Estimate:
    """The same of a resident model whose modules and parameters lie on devices, by their paths.

    A block's graph is where the block is, and the logits are where the last module is.
    """
    model, needed = skeleton.model, Counter[torch.device]()
    for name, parameter in model.named_parameters():
        needed[device_of(name)] += parameter.numel() * model.dtype.itemsize
    for layer in skeleton.layers:
        needed[device_of(layer.path)] += sum_bytes(layer.spec, work.statistics)
    for path in skeleton.blocks.paths:
        needed[device_of(path)] += _graph_bytes(skeleton, work)
    *_, last = (name for name, _ in model.named_parameters(remove_duplicate=False))
    needed[device_of(last)] += _head_bytes(skeleton, work)
    shares = {
        str(device): Share(needed_bytes=size, free_bytes=free_bytes(device))
        for device, size in sorted(needed.items(), key=lambda x: str(x[0]))
    }
    free = sum(share.free_bytes for share in shares.values())
    return replace(planned, free_bytes=free, shares=shares)


def _graph_bytes(skeleton: Skeleton, work: Workload) -> int:
    """What autograd and the hooks keep of a block."""
    widths = [(x.spec.block, sum(x.spec.shape)) for x in skeleton.layers]
    hidden, _ = _widths(skeleton.model, skeleton.layers)
    kept = _largest(widths, skeleton.blocks.count) + _BLOCK_WIDTHS * hidden
    itemsize: int = skeleton.model.dtype.itemsize
    return work.batch_size * work.seq_len * itemsize * kept


def _head_bytes(skeleton: Skeleton, work: Workload) -> int:
    """The logits and their gradient, and both in float32."""
    _, outputs = _widths(skeleton.model, skeleton.layers)
    itemsize: int = skeleton.model.dtype.itemsize
    return work.batch_size * work.seq_len * outputs * (2 * itemsize + 2 * 4)


def _largest(values: Sequence[tuple[int | None, int]], depth: int) -> int:
    """The largest sum over one block."""
    return max(sum(value for block, value in values if block == i) for i in range(depth))


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
    embeddings = None if model.main_input_name == "pixel_values" else model.get_input_embeddings()
    if isinstance(embeddings, nn.Embedding):
        return embeddings.embedding_dim, embeddings.num_embeddings
    return layers[0].spec.shape[1], model.config.num_labels


def sum_bytes(layer: LayerSpec, statistics: tuple[str, ...]) -> int:
    """Of a layer's sums on the device."""
    return sum(4 * math.prod(STATISTICS[x].sum_shape(layer.shape)) for x in layer.own(statistics))


def _stored_bytes(layer: LayerSpec, work: Workload) -> int:
    return int(
        sum(
            METADATA_BYTES + STATISTICS[name].stored_bytes(work.encoding, layer.shape)
            for name in layer.own(work.statistics)
        )
    )
