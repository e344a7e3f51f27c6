"""Objects: named bytes, written durably to a local folder and read back, verified, from anywhere.

A key is a relative POSIX path (`layers/<layer>/<statistic>/codes/c/0/0`). Zarr cannot tell a
missing object from zeros, so nothing counts as written until a commit record names it, with its
size and digest. A store has one record over all (`commit.json`); a snapshot has one of its own.
Readers get no byte that their record does not vouch for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import fsspec
import fsspec.implementations.local
import xxhash

from gradpipe.errors import GradpipeError, InputError, StoreError, one_line

COMMIT_KEY = "commit.json"
_MAX_RECORD_BYTES = 1 << 28  # 256 MiB: about 2 million objects
_BLOCK_BYTES = 1 << 23  # read at a time where nothing is kept
_FSYNC_THREADS = 16
_STEP = r"(?!\.{1,2}[/\"])[A-Za-z0-9_.\-]{1,255}"  # neither . nor .., which could leave the store
_ENTRY = re.compile(rf'"({_STEP}(?:/{_STEP})*)":\[(\d{{1,18}}),"([0-9a-f]{{32}})"\]'.encode())
_TEMPORARY = ".{}.tmp"  # one writer per object, so that a name is enough, and a restart reuses it


def digest(data: bytes | bytearray | memoryview) -> str:
    """xxh3-128 of `data`, as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(memoryview(data))


@dataclass(slots=True)
class CommitRecord:
    """Size and digest of each committed object, by key."""

    objects: dict[str, tuple[int, str]] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The canonical JSON form: sorted, with a digest of its own."""
        objects = {key: list(self.objects[key]) for key in sorted(self.objects)}
        body = json.dumps(objects, separators=(",", ":"))
        document = {"format": "gradpipe-commit-1", "digest": digest(body.encode())}
        return (json.dumps(document)[:-1] + ', "objects": ' + body + "}\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The record in `data`; StoreError unless it is, to the byte, what `to_bytes` writes.

        Entries are looked for, not parsed as JSON, so that no document can take more memory than
        its entries do; what is no entry changes the bytes.
        """
        found = ((x[1].decode(), int(x[2]), x[3].decode()) for x in _ENTRY.finditer(data))
        record = cls({key: (size, hexes) for key, size, hexes in found})
        if record.to_bytes() != data:
            raise StoreError(
                f"object {COMMIT_KEY} is damaged, or holds what is no object's key, size and "
                "digest: restore it from a copy, or remove the store and collect again"
            )
        return record


class ObjectWriter:
    """Writes objects under one local folder, and makes them durable when it commits."""

    def __init__(self, folder: Path) -> None:
        """`folder` is created when the first object is written."""
        self.folder = folder
        self.record = CommitRecord()

    def write(self, key: str, data: bytes) -> None:
        """Write `data` under `key`, whole or not at all; durable only once committed."""
        path = self.folder / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, data)
        except OSError as error:
            raise _write_error(path, error) from error
        self.record.objects[key] = (len(data), digest(data))

    def commit(self, key: str = COMMIT_KEY) -> None:
        """Make all objects written so far durable, then declare them complete under `key`."""
        files = [self.folder / name for name in self.record.objects]
        folders = {folder for file in files for folder in file.parents if self._is_inside(folder)}
        record = self.folder / key
        try:
            with ThreadPoolExecutor(_FSYNC_THREADS) as pool:  # file systems batch these
                list(pool.map(fsync, [*files, *folders, self.folder.absolute().parent]))
            record.parent.mkdir(parents=True, exist_ok=True)
            write_durably(record, self.record.to_bytes())
        except OSError as error:
            raise _write_error(record, error) from error

    def _is_inside(self, folder: Path) -> bool:
        return folder == self.folder or self.folder in folder.parents


def write_durably(path: Path, data: bytes) -> None:
    """Publish `data` as `path`, whole or not at all, whatever happens to the machine."""
    _replace(path, data, durable=True)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write a sibling file, then rename it."""
    temporary = path.with_name(_TEMPORARY.format(path.name))
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_error(path: Path, error: OSError) -> GradpipeError:
    return GradpipeError(
        f"cannot write {path}: {error.strerror or error}: make room or give another folder, "
        "then run the same command again"
    )


def remove_strays(folder: Path, among: Iterable[str], keep: Iterable[str]) -> None:
    """Delete the files and folders of `folder` named in `among`, but for objects to `keep`."""
    kept = set(keep)
    for top in among:
        for parent, _, names in os.walk(folder / top, topdown=False):
            for name in names:
                path = Path(parent, name)
                if path.relative_to(folder).as_posix() not in kept:
                    path.unlink(missing_ok=True)  # another process may be tidying too
            with suppress(OSError):  # it is not empty, or gone already
                Path(parent).rmdir()
        for path in (folder / top, folder / _TEMPORARY.format(top)):
            if top not in kept and not path.is_dir():
                path.unlink(missing_ok=True)


class ObjectReader:
    """Reads a complete store's objects from a path or any fsspec URL, each one verified."""

    def __init__(
        self, url: str, options: dict[str, Any] | None = None, record_key: str = COMMIT_KEY
    ) -> None:
        """Read the commit record.

        Raises InputError where nothing is found at `url`, or it cannot be reached; StoreError
        where a store is but has no commit record, or a damaged one.
        """
        self.url = url
        try:
            self._files, root = fsspec.core.url_to_fs(url, **(options or {}))
            self._root = root.rstrip("/")
            self._check_complete(record_key)
        except GradpipeError:
            raise
        except Exception as error:  # every fsspec backend raises from families of its own
            raise InputError(
                f"cannot open store {url} ({one_line(error)}): check the URL and the credentials"
            ) from error
        data = self._read_file(record_key, _MAX_RECORD_BYTES)
        self.record_digest = digest(data)  # names the store's whole content
        try:
            self.record = CommitRecord.from_bytes(data)
        except StoreError as error:
            raise StoreError(f"store {url}: {error}") from error

    @property
    def local_folder(self) -> Path | None:
        """The folder behind the URL, also behind `file://`; None if it is remote."""
        is_local = isinstance(self._files, fsspec.implementations.local.LocalFileSystem)
        return Path(self._root) if is_local else None

    def _check_complete(self, record_key: str) -> None:
        """Look for the commit record, and where there is none, for what there is instead."""
        if self._files.exists(f"{self._root}/{record_key}"):
            return
        if self._files.exists(f"{self._root}/zarr.json"):
            raise StoreError(
                f"store {self.url} is incomplete (no {COMMIT_KEY}): run its collect-grads again, "
                "or its import"
            )
        if self._files.exists(self._root):
            raise InputError(
                f"{self.url} is not a gradient store: it has neither {COMMIT_KEY} nor zarr.json"
            )
        raise InputError(
            f"no store at {self.url}: expected a folder or URL that `pipe collect-grads` wrote"
        )

    def read(self, key: str, limit: int) -> bytes:
        """The bytes under `key`; StoreError if they are missing or not those committed.

        Also raises StoreError if they are more than `limit`: the record is not trusted to say how
        much memory is taken.
        """
        size, _ = self._entry(key)
        if size > limit:
            raise StoreError(
                f"store {self.url}: object {key} has {size} bytes, expected at most {limit}: "
                "the store is damaged"
            )
        data = self._read_file(key, size)
        self._check(key, len(data), digest(data))
        return data

    def verify(self, key: str) -> None:
        """Read the object in passing; StoreError if it is missing or not what was committed."""
        size, _ = self._entry(key)
        left, hashed = size + 1, xxhash.xxh3_128()
        with self._opened(key) as file:
            while left and (block := file.read(min(left, _BLOCK_BYTES))):
                hashed.update(block)
                left -= len(block)
        self._check(key, size + 1 - left, hashed.hexdigest())

    def _entry(self, key: str) -> tuple[int, str]:
        """Size and digest of an object by the record."""
        if key not in self.record.objects:
            raise StoreError(
                f"store {self.url}: {key} is not in its commit record: the store is damaged"
            )
        return self.record.objects[key]

    def _check(self, key: str, size: int, found: str) -> None:
        expected_size, expected = self._entry(key)
        if (size, found) != (expected_size, expected):
            raise StoreError(
                f"store {self.url}: object {key} is damaged "
                f"(expected {expected_size} bytes, xxh3 {expected}; got {size} bytes, {found}): "
                "restore it from a copy, or remove the store and collect again"
            )

    def _check_file(self, folder: Path, key: str) -> None:
        """Refuse what a stranger's folder may hold in an object's place: pipes, links out of it."""
        path = folder / key
        is_odd = path.exists() and not path.is_file()
        if is_odd or not path.resolve().is_relative_to(folder.resolve()):
            raise StoreError(
                f"store {self.url}: object {key} is not a file inside the store: restore it from a "
                "copy; a store of links is to be copied with the links followed"
            )

    def _read_file(self, key: str, limit: int) -> bytes:
        """At most `limit + 1` bytes of the file behind `key`."""
        with self._opened(key) as file:
            size = getattr(file, "size", None)  # a buffer of `limit` is not taken for less
            data: bytes = file.read(limit + 1 if size is None else min(limit + 1, size))
        return data

    @contextmanager
    def _opened(self, key: str) -> Iterator[BinaryIO]:
        """The file behind `key`, and what its backend may raise told in our words."""
        if self.local_folder is not None:
            self._check_file(self.local_folder, key)
        try:
            with self._files.open(f"{self._root}/{key}", "rb", cache_type="none") as file:
                yield file
        except FileNotFoundError as error:
            raise StoreError(
                f"store {self.url}: object {key} is missing: restore it from a copy, "
                "or remove the store and collect again"
            ) from error
        except Exception as error:  # every fsspec backend raises from families of its own
            raise GradpipeError(
                f"store {self.url}: cannot read {key}: {one_line(error)}"
            ) from error
