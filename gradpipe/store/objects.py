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
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

import xxhash

from gradpipe.errors import GradpipeError, InputError, StoreError, one_line, without_credentials
from gradpipe.store.nearby import ObjectCache, ReadAhead
from gradpipe.store.urls import local_place, located

T = TypeVar("T")
COMMIT_KEY = "commit.json"
COPY_KEY = "partial/copy.json"  # the record of a copy that is under way: `store/destination.py`
MAX_RECORD_BYTES = 1 << 28  # 256 MiB: about 2 million objects
_BLOCK_BYTES = 1 << 23  # read at a time where nothing is kept
_REMEDY = "make room or give another folder"
_FSYNC_THREADS = 16
_WAITS = (0.1, 0.5)  # seconds, before bytes that came damaged are asked for again
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

    def add(self, more: CommitRecord) -> None:
        """Count what another record names."""
        self.objects.update(more.objects)

    def to_bytes(self) -> bytes:
        """The canonical JSON form: sorted, with a digest of its own."""
        objects = {key: list(self.objects[key]) for key in sorted(self.objects)}
        body = json.dumps(objects, separators=(",", ":"))
        document = {"format": "gradpipe-commit-1", "digest": digest(body.encode())}
        return (json.dumps(document)[:-1] + ', "objects": ' + body + "}\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, key: str = COMMIT_KEY) -> Self:
        """The record in `data`; StoreError unless it is, to the byte, what `to_bytes` writes.

        Entries are looked for, not parsed as JSON, so that no document can take more memory than
        its entries do; what is no entry changes the bytes.
        """
        found = ((x[1].decode(), int(x[2]), x[3].decode()) for x in _ENTRY.finditer(data))
        record = cls({key: (size, hexes) for key, size, hexes in found})
        if record.to_bytes() != data:
            raise StoreError(
                f"object {key} is damaged, or holds what is no object's key, size and "
                "digest: restore it from a copy, or remove the store and collect again"
            )
        return record


class ObjectWriter:
    """Writes objects under a local folder, which it creates, and makes them durable: `commit`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = CommitRecord()

    def write(self, key: str, data: bytes) -> None:
        """Write `data` under `key`, whole or not at all; durable only once committed."""
        path = self.folder / key
        with disk_errors(f"cannot write {path}", _REMEDY):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, durable=False) as file:
                file.write(data)
        self.record.objects[key] = (len(data), digest(data))

    def commit(self, key: str = COMMIT_KEY) -> None:
        """Make all objects written so far durable, then declare them complete under `key`."""
        files = [self.folder / name for name in self.record.objects]
        folders = {x for file in files for x in file.parents if x.is_relative_to(self.folder)}
        record = self.folder / key
        with disk_errors(f"cannot write {record}", _REMEDY):
            with ThreadPoolExecutor(_FSYNC_THREADS) as pool:  # file systems batch these
                list(pool.map(fsync, [*files, *folders, self.folder.absolute().parent]))
            record.parent.mkdir(parents=True, exist_ok=True)
            write_durably(record, self.record.to_bytes())


def write_durably(path: Path, data: bytes) -> None:
    """Publish `data` as `path`, whole or not at all, whatever happens to the machine."""
    with replacing(path) as file:
        file.write(data)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A sibling file to write, which becomes `path` once it is whole, or is gone."""
    temporary = path.with_name(_TEMPORARY.format(path.name))
    try:
        with open(temporary, "wb", opener=_no_link) as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)  # a stranger may have put one there


@contextmanager
def disk_errors(what: str, remedy: str) -> Iterator[None]:
    """Say what a failure of the disk is about, and what to do: GradpipeError in its place."""
    try:
        yield
    except OSError as error:
        raise GradpipeError(
            f"{what}: {error.strerror or error}: {remedy}, then run the same command again"
        ) from error


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
    """Reads a complete store's objects from a path or any fsspec URL, each one verified.

    File systems try again by themselves, with growing waits and a bound, where a server does not
    answer or a connection breaks; bytes that arrive and are not the object's are asked for again
    here.
    """

    def __init__(
        self,
        url: str,
        options: dict[str, Any] | None = None,
        record_key: str = COMMIT_KEY,
        cache: ObjectCache | None = None,
    ) -> None:
        """Read the commit record.

        Raises InputError where nothing is found at `url`, or it cannot be reached; StoreError
        where a store is but has no commit record, or a damaged one.
        """
        self.url = without_credentials(url)
        self._ahead: ReadAhead | None = None
        try:
            self._files, self._root = located(url, options)
            self._files.invalidate_cache()  # what another process has written since is there
            self._plain = {self._root or "/"}  # folders in the store that are no links
            self._check_complete(record_key)
        except GradpipeError:
            raise
        except Exception as error:  # every fsspec backend raises from families of its own
            raise InputError(
                f"cannot open store {self.url} ({one_line(error)}): check the URL and the "
                "credentials"
            ) from error
        self._cache = cache if self.local_folder is None else None
        self.record, self.record_digest = self._until_sound(lambda: self._read_record(record_key))

    def _read_record(self, key: str) -> tuple[CommitRecord, str]:
        """The commit record, and its digest, which names the store's whole content."""
        data = self._read_file(key, MAX_RECORD_BYTES)
        try:
            return CommitRecord.from_bytes(data, key), digest(data)
        except StoreError as error:
            raise StoreError(f"store {self.url}: {error}") from error

    @property
    def local_folder(self) -> Path | None:
        """The folder behind the URL, also behind `file://`; None if it is remote."""
        return local_place(self._files, self._root)

    def _check_complete(self, record_key: str) -> None:
        """Look for the commit record, and where there is none, for what there is instead."""
        if self._files.exists(f"{self._root}/{record_key}"):
            return
        if self._files.exists(f"{self._root}/{COPY_KEY}"):
            raise StoreError(
                f"store {self.url} is incomplete (no {COMMIT_KEY}): it is being copied, or was: "
                "run its pipe store copy again"
            )
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
        return self._fetch(key) if self._ahead is None else self._ahead.read(key)

    def begin(self, now: Iterable[str], later: Iterable[str]) -> None:
        """Say what this thread reads now, and what is read later: `reading_ahead` fetches it."""
        if self._ahead is not None:
            self._ahead.begin(now, later)

    @contextmanager
    def reading_ahead(self) -> Iterator[None]:
        """Fetch several objects at once; of a local folder they are read as they are asked for."""
        if self.local_folder is not None:
            yield
            return
        if self._files.protocol == "hf":  # which else lists the folder of each object
            with self._told("its objects"):
                self._files.find(self._root)
        self._ahead = ReadAhead(self._fetch, lambda key: self._entry(key)[0])
        try:
            yield
        finally:
            self._ahead.close()
            self._ahead = None

    def _fetch(self, key: str) -> bytes:
        """An object from the cache, or from where the store is."""
        entry = self._entry(key)
        data = None if self._cache is None else self._cache.read(*entry)
        if data is not None:
            return data
        data = self._until_sound(lambda: self._read_sound(key))
        if self._cache is not None:
            self._cache.write(entry[1], data)
        return data

    def _read_sound(self, key: str) -> bytes:
        data = self._read_file(key, self._entry(key)[0])
        self._check(key, len(data), digest(data))
        return data

    def _until_sound(self, read: Callable[[], T]) -> T:
        """What `read` gives; from far away again, a few times, where it raises StoreError."""
        for wait in _WAITS if self.local_folder is None else ():
            try:
                return read()
            except StoreError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    raise
                time.sleep(wait)
        return read()

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
        if self._is_plain(f"{self._root}/{key}", stat.S_ISREG):
            return
        path = folder / key
        is_odd = path.exists() and not path.is_file()
        if is_odd or not path.resolve().is_relative_to(folder.resolve()):
            raise StoreError(
                f"store {self.url}: object {key} is not a file inside the store: restore it from a "
                "copy; a store of links is to be copied with the links followed"
            )

    def _is_plain(self, path: str, is_kind: Callable[[int], bool] = stat.S_ISDIR) -> bool:
        """True for a file or a folder of the store to which no link leads; folders are kept."""
        if path in self._plain:
            return True
        try:
            found = is_kind(os.lstat(path).st_mode) and self._is_plain(path.rpartition("/")[0])
        except OSError:
            return False
        if found and is_kind is stat.S_ISDIR:
            self._plain.add(path)
        return found

    def _read_file(self, key: str, limit: int) -> bytes:
        """At most `limit + 1` bytes of the file behind `key`; from far away in one request."""
        if self.local_folder is None:
            with self._told(key):
                return self._read_range(f"{self._root}/{key}", limit + 1)
        with self._opened(key) as file:
            size = getattr(file, "size", None)  # a buffer of `limit` is not taken for less
            data: bytes = file.read(limit + 1 if size is None else min(limit + 1, size))
        return data

    def _read_range(self, path: str, end: int) -> bytes:
        try:
            return bytes(self._files.cat_file(path, start=0, end=end))
        except FileNotFoundError:
            raise
        except Exception:  # no range of an empty file is one, to HTTP
            if self._files.size(path) == 0:
                return b""
            raise

    @contextmanager
    def _opened(self, key: str) -> Iterator[BinaryIO]:
        if self.local_folder is not None:
            self._check_file(self.local_folder, key)
        path = f"{self._root}/{key}"
        with self._told(key), self._files.open(path, "rb", cache_type="none") as file:
            yield file

    @contextmanager
    def _told(self, key: str) -> Iterator[None]:
        """What a backend may raise over an object, in our words."""
        try:
            yield
        except GradpipeError:
            raise
        except FileNotFoundError as error:
            raise StoreError(
                f"store {self.url}: object {key} is missing: restore it from a copy, "
                "or remove the store and collect again"
            ) from error
        except Exception as error:  # every fsspec backend raises from families of its own
            raise GradpipeError(
                f"store {self.url}: cannot read {key}: {one_line(error)}"
            ) from error
