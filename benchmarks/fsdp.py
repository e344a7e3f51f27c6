"""FSDP against the two schedules, on ranks of this host: time, peak memory, and whether sums agree.

    python benchmarks/fsdp.py                   # a Llama of 8 blocks of width 512, 2 ranks

Every side is `collect-grads` by as many ranks over gloo, to the same statistics. `fsdp` is the
resident schedule on a model whose blocks are sharded over the ranks (`torch.distributed.fsdp`'s
fully_shard): each rank runs its own samples, one at a time, with the same hooks, and weights are
gathered block by block, forward and backward. Its sums are not sharded, as FSDP has no word for
them. The model is never whole on a rank: each tensor is read, cut, and let go of.

Ranks are forks of this process, which has imported everything, with one thread each. Where others
work on the host, CPU seconds are the steadier figure.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

# isort: split
import numpy as np
import torch
import typer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from benchmarks.measures import Cost, in_a_fork
from benchmarks.random_llama import MB, LlamaSize, heading, table, write_checkpoint
from benchmarks.ranks import free_port
from gradpipe import CollectConfig, DataConfig, GradientStore, collect, open_store
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.collect.resident import Resident
from gradpipe.stages.model.load import build_skeleton

SIDES = {"fsdp": "resident", "streamed": "streamed", "resident": "resident"}


def load_sharded(schedule: Resident) -> Any:
    """What a resident run takes for its model, with each block sharded over the ranks."""
    skeleton = schedule._skeleton  # noqa: SLF001 (in the place of its `_load`)
    checkpoint = skeleton.checkpoint
    model, _ = build_skeleton(checkpoint, skeleton.model.dtype)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for path in skeleton.blocks.paths:
        fully_shard(model.get_submodule(path), mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    for name, parameter in model.named_parameters():
        whole = checkpoint.read(name)
        part = distribute_tensor(whole, mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(part.to_local())
    return model


def run(
    model: Path, store: Path, side: str, count: int, samples: int, seq_len: int
) -> tuple[float, list[Cost]]:
    """The seconds that one side takes, and what each rank did."""
    config = CollectConfig(
        model=str(model),
        store=store,
        data=DataConfig(name=str(model / "ids.npy")),
        num_samples=samples,
        seq_len=seq_len,
        encoding="float32",
        schedule=SIDES[side],
    )
    port, start = free_port(), time.monotonic()

    def work(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if side == "fsdp":
            Resident._load = load_sharded  # type: ignore[method-assign,assignment]  # noqa: SLF001
        collect(config)

    works: list[Callable[[], None]] = [partial(work, rank) for rank in range(count)]
    with ThreadPoolExecutor(count) as threads:
        costs = list(threads.map(in_a_fork, works))
    return time.monotonic() - start, costs


def agreement(one: GradientStore, other: GradientStore) -> str:
    """How far apart the sums of two stores are at most."""
    if one.digest == other.digest:
        return "the same bytes"
    apart = max(
        float(np.abs(a - b).max() / np.abs(b).max())
        for layer in one.spec.layers
        for name in one.spec.statistics
        for a, b in [(one.read_norms(layer, name), other.read_norms(layer, name))]
    )
    return f"{apart:.0e} of the largest"


def main(
    ranks: Annotated[int, typer.Option(min=2)] = 2,
    hidden: Annotated[int, typer.Option(min=16)] = 512,
    blocks: Annotated[int, typer.Option(min=1)] = 8,
    vocab: Annotated[int, typer.Option(min=300)] = 4096,
    samples: Annotated[int, typer.Option(min=2)] = 16,
    seq_len: Annotated[int, typer.Option(min=2)] = 128,
) -> None:
    """Collect with FSDP, streamed and resident; print a table."""
    torch.set_num_threads(1)
    size = LlamaSize(
        hidden=hidden, intermediate=11 * hidden // 4, blocks=blocks, vocab=vocab, heads=8
    )
    rows, stores = [], dict[str, GradientStore]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "model", size)
        skeleton = build_skeleton(Checkpoint.open(str(folder / "model")), torch.float32)
        del skeleton  # it has brought in what the model's class needs
        ids = np.random.default_rng(0).integers(0, vocab, (samples, seq_len))
        np.save(folder / "model" / "ids.npy", ids)
        for side in SIDES:
            seconds, costs = run(folder / "model", folder / side, side, ranks, samples, seq_len)
            peak = max(cost.peak_bytes for cost in costs) / MB
            busiest = max(cost.cpu_seconds for cost in costs)
            stores[side] = open_store(folder / side)
            rows.append([side, f"{seconds:.1f}", f"{busiest:.1f}", f"{peak:,.0f}"])
        for row in rows:
            row.append(agreement(stores[row[0]], stores["resident"]))
    weights = sum(x.num_weights for x in stores["resident"].spec.layers) / MB
    print(heading("FSDP"))
    print(f"{ranks} ranks, {weights:.0f} M weights of layers, {samples} samples of {seq_len}.\n")
    print(table(["side", "s", "CPU s, a rank", "peak, MB, a rank", "sums"], rows))


if __name__ == "__main__":
    typer.run(main)
