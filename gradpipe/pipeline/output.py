"""Output folders: written beside their final name, renamed into place, described by a report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from gradpipe.errors import GradpipeError, InputError
from gradpipe.pipeline.destination import REPORT
from gradpipe.store.lock import locked
from gradpipe.store.objects import fsync, write_durably
from gradpipe.store.partial import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerResult:
    """One layer of a written checkpoint, as read back from its file."""

    name: str
    requested: float  # sparsity
    zeros: int
    size: int
    pattern: str | None = None  # n:m, where it is one

    @property
    def achieved(self) -> float:
        """The share of weights that are zero."""
        return self.zeros / self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneResult:
    """One written checkpoint."""

    folder: Path
    label: str
    requested: float  # sparsity, over all pruned layers
    layers: tuple[LayerResult, ...]

    @property
    def achieved(self) -> float:
        """Sparsity found in the written files, over all pruned layers."""
        return sum(x.zeros for x in self.layers) / sum(x.size for x in self.layers)


@contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, removed on any error."""
    staging = _staging_path(out)
    created = [parent for parent in staging.parents if not parent.exists()]
    _remove(staging)
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise GradpipeError(f"cannot create {staging}: {error.strerror}") from error
    try:
        yield staging
    except BaseException as error:
        _remove(staging)
        with suppress(OSError):  # somebody else's files may be there by now
            for parent in created:
                parent.rmdir()
        if isinstance(error, OSError):
            raise GradpipeError(
                f"cannot write {out} ({error.filename or staging}: {error.strerror or error}): "
                "make room or give another folder, then run the same command again"
            ) from error
        raise


class SharedStaging:
    """A staging folder that several shards fill; a file counts once its record is written."""

    def __init__(self, out: Path, shard: Shard, identity: bytes) -> None:
        """`identity` is what all the shards must agree on."""
        self.folder = _staging_path(out)
        self._out = out
        self._records = self.folder / ".shards"
        self._identity = identity
        self._locks = ExitStack()
        self._name = shard.name

    def __enter__(self) -> Self:
        """Take this shard's lock; InputError if the folder is another command's."""
        self._records.mkdir(parents=True, exist_ok=True)
        lock = self.folder.with_name(f".{self._out.name}.{self._name}.lock")
        self._locks.enter_context(locked(lock, wait=False))
        with self._locked():
            self._records.mkdir(parents=True, exist_ok=True)
            path = self._records / "identity"
            if not path.exists():
                write_durably(path, self._identity)
            if path.read_bytes() != self._identity:
                self._locks.close()
                raise InputError(
                    f"{self.folder} is of another prune command: finish that one, or remove it"
                )
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the shard."""
        self._locks.close()

    def is_written(self, file: str) -> bool:
        """True if this file is done for every target."""
        return self._record(file).exists()

    def record(self, file: str, data: bytes) -> None:
        """Count a file as done."""
        write_durably(self._record(file), data)

    @contextmanager
    def last_of(self, files: Sequence[str]) -> Iterator[list[bytes] | None]:
        """Every file's record, to the one shard that finds them all; else None."""
        with self._locked():
            whole = all(self.is_written(file) for file in files)
            yield [self._record(file).read_bytes() for file in files] if whole else None

    def publish(self) -> None:
        """Rename the folder to its final name."""
        _remove(self._records)
        publish(self.folder, self._out)

    def _record(self, file: str) -> Path:
        return self._records / f"{file}.json"

    def _locked(self) -> AbstractContextManager[None]:
        return locked(self.folder.with_name(f".{self._out.name}.lock"), wait=True)


def _staging_path(out: Path) -> Path:
    return out.resolve().with_name(f".{out.resolve().name}.partial")


def publish(staging: Path, out: Path) -> None:
    """Rename the finished `staging` to `out`, replacing what was there."""
    out = out.resolve()
    for path in [staging, *(p for p in staging.rglob("*") if p.is_dir())]:
        fsync(path)
    old = staging.with_name(f".{out.name}.old")
    _remove(old)
    if out.exists():
        out.rename(old)
    staging.rename(out)
    fsync(out.parent)
    _remove(old)


def write_report(folder: Path, report: dict[str, Any], result: PruneResult) -> None:
    """Write `pruning.json` and the model card."""
    document = {
        "gradpipe": version("gradpipe"),
        **report,
        "requested_sparsity": result.requested,
        "achieved_sparsity": result.achieved,
        "layers": {
            layer.name: {
                "requested": layer.requested,
                "pattern": layer.pattern,
                "achieved": layer.achieved,
                "zeros": layer.zeros,
                "size": layer.size,
            }
            for layer in result.layers
        },
    }
    write_durably(folder / REPORT, (json.dumps(document, indent=1) + "\n").encode())
    write_durably(folder / "README.md", _model_card(document).encode())


def _model_card(report: dict[str, Any]) -> str:
    """A README.md that the Hub shows."""
    return f"""---
base_model: {report["model"]}
tags: [pruned, sparse, gradpipe]
---
# {report["model"]}, pruned

| | |
|---|---|
| method | {report["method"]} |
| pattern | {report["pattern"]} |
| sparsity of the pruned layers | {report["achieved_sparsity"]:.4f} |
| statistics | {", ".join(report["statistics"]) or "none"} |
| gradient store | `{report["store"]}` |

Made with gradpipe {report["gradpipe"]}:

    {report["command"]}

Sparsity of each layer: `pruning.json`. The weights are dense tensors with zeros in them.
"""


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
