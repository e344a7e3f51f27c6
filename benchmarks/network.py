"""What pruning from a remote store reads of it: requests and bytes, against depth and method.

    python benchmarks/network.py                             # half a minute

The store lies in fsspec's memory, which counts what it is asked for; it is of random sums, at the
sizes of `scaling.py`'s depths.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import fsspec
import typer
from fsspec.implementations.memory import MemoryFileSystem

from benchmarks.random_llama import MB, heading, table, write_checkpoint, write_store
from benchmarks.scaling import AXES, BASE
from gradpipe import PruneConfig, prune

URL: Final = "memory://network"
METHODS: Final = ("magnitude", "wanda", "gblm")


@dataclass(slots=True)
class Traffic:
    """What was asked for."""

    requests: int = 0
    num_bytes: int = 0


@contextmanager
def counted() -> Iterator[Traffic]:
    """Meanwhile, what is read of fsspec's memory: whole files, or the ranges asked for."""
    traffic = Traffic()
    whole, opened = MemoryFileSystem.cat_file, MemoryFileSystem.open

    def cat_file(self: Any, path: str, *options: Any, **more: Any) -> bytes:
        data: bytes = whole(self, path, *options, **more)
        traffic.requests += 1
        traffic.num_bytes += len(data)
        return data

    def open_file(self: Any, path: str, *options: Any, **more: Any) -> Any:
        traffic.requests += 1
        traffic.num_bytes += self.size(path)
        return opened(self, path, *options, **more)

    MemoryFileSystem.cat_file, MemoryFileSystem.open = cat_file, open_file
    try:
        yield traffic
    finally:
        MemoryFileSystem.cat_file, MemoryFileSystem.open = whole, opened


def measure(blocks: int, folder: Path) -> Iterator[tuple[str, Traffic, int]]:
    """Each method's traffic for a model of so many blocks, and the store's bytes."""
    model, store, files = folder / "model", folder / "store", fsspec.filesystem("memory")
    write_checkpoint(model, replace(BASE, blocks=blocks))
    write_store(model, store)
    size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    files.put(str(store), "/network", recursive=True)
    try:
        for method in METHODS:
            config = PruneConfig(model=str(model), store=URL, out=folder / method, method=method)
            with counted() as traffic:
                prune(config)
            yield method, traffic, size
    finally:
        files.rm("/network", recursive=True)


def main() -> None:
    """Print a table."""
    rows = []
    for blocks in AXES["depth"]:
        with tempfile.TemporaryDirectory() as folder:
            rows += [
                [
                    f"{blocks}, {method}",
                    str(traffic.requests),
                    f"{traffic.requests / blocks:.1f}",
                    f"{traffic.num_bytes / MB:.2f}",
                    f"{100 * traffic.num_bytes / size:.0f} %",
                ]
                for method, traffic, size in measure(blocks, Path(folder))
            ]
    header = ["depth, method", "requests", "a block", "MB", "of the store"]
    print(heading("Reading a remote store"), table(header, rows), sep="\n")


if __name__ == "__main__":
    typer.run(main)
