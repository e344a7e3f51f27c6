"""Pruning on 1, 2 and 4 ranks of this host, one file: seconds, and each rank's CPU seconds.

    python benchmarks/ranks.py

The ranks are forked from this process, which has imported everything, with one thread each. Where
the host has fewer cores than ranks, or others work on it, the busiest rank's CPU seconds tell what
is shared out: about the time that the command would take on enough cores. The bytes are compared.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

# isort: split
import torch
import typer

from benchmarks.random_llama import LlamaSize, heading, table, write_checkpoint, write_store
from gradpipe.__main__ import main as pipe
from gradpipe.pipeline.prune import run as _pruning  # noqa: F401 (before the fork)
from gradpipe.store.objects import digest


def free_port() -> str:
    """A port that nobody listens at, for ranks to meet."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def run(count: int, arguments: list[str]) -> tuple[float, list[float]]:
    """The seconds that a command takes on so many ranks, and the CPU seconds of each."""
    port, start, ranks = free_port(), time.monotonic(), list[int]()
    for rank in range(count):
        pid = os.fork()
        if not pid:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            sys.argv = ["pipe", *arguments]
            _become_pipe()
        ranks.append(pid)
    used = []
    for pid in ranks:
        _, status, usage = os.wait4(pid, 0)
        if status:
            raise SystemExit(f"pipe {' '.join(arguments)} failed")
        used.append(usage.ru_utime + usage.ru_stime)
    return time.monotonic() - start, used


def _become_pipe() -> None:
    code = 99
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        pipe()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        os._exit(code)


def written(folder: Path) -> str:
    """The digest of every file's."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest("".join(digest(path.read_bytes()) for path in files).encode())


def main(
    blocks: Annotated[int, typer.Option(help="Of the random Llama.")] = 4,
    hidden: Annotated[int, typer.Option(help="Its width.")] = 768,
) -> None:
    """Print a table."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        size = LlamaSize(
            hidden=hidden, intermediate=11 * hidden // 4, blocks=blocks, blocks_per_shard=blocks
        )
        write_checkpoint(work / "model", size)
        write_store(work / "model", work / "store")
        bytes_of = set[str]()
        for count in (1, 2, 4):
            paths = map(str, (work / "model", work / "store", work / "out"))
            seconds, used = run(count, ["prune", *paths, "--sparsity", "0.5", "--workers", "1"])
            bytes_of.add(written(work / "out"))
            shutil.rmtree(work / "out")
            rows.append([str(count), f"{seconds:.1f}", f"{max(used):.1f}", f"{sum(used):.1f}"])
        if len(bytes_of) != 1:
            raise SystemExit("the bytes differ")
    print(heading("Pruning on ranks"))
    print(table(["ranks", "s", "CPU s, busiest rank", "CPU s, all"], rows))


if __name__ == "__main__":
    typer.run(main)
