"""Where a finished store is copied to: a local folder, or a bucket that fsspec writes to.

A copy begins with `partial/copy.json`, the commit record of what is being copied: whoever comes
by later goes on with it, or sees that it is of another store. Objects follow in any order, each
read back and held against its digest. The root's `zarr.json` and then `commit.json` come last:
before them nothing looks like a store.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from gradpipe.errors import GradpipeError, InputError, one_line, without_credentials
from gradpipe.store.folder import LOCK_NAME, PARTIAL, tidy
from gradpipe.store.lock import locked
from gradpipe.store.objects import (
    COMMIT_KEY,
    COPY_KEY,
    MAX_RECORD_BYTES,
    CommitRecord,
    ObjectReader,
    ObjectWriter,
    digest,
)
from gradpipe.store.urls import located

ROOT_KEY = "zarr.json"
_AT_ONCE, _LARGE_AT_ONCE = 8, 2  # objects under way, each in memory as a whole
_LARGE_BYTES = 1 << 26
_TRIES = 3  # of writing an object that does not arrive as it was sent
Advance = Callable[[int], None]


class Destination(ABC):
    """A place for one store, of which fsspec knows what lies there."""

    def __init__(self, url: str) -> None:
        """Nothing is looked at yet; InputError for a URL that no file system knows."""
        self.url = without_credentials(url)
        with self._reached():
            self._files, self._root = located(url)

    def exclusive(self) -> AbstractContextManager[None]:
        """Keep other copies away, where that can be done."""
        return nullcontext()

    def names(self) -> set[str]:
        """What lies at its top: nothing, if it does not exist."""
        with self._reached():
            self._files.invalidate_cache()
            try:
                paths = self._files.ls(self._root, detail=False)
            except FileNotFoundError:
                return set()
        return {path.rstrip("/").rpartition("/")[2] for path in paths}

    def read(self, key: str) -> bytes | None:
        """A record that lies there, if it does."""
        with self._reached():
            try:
                path = self._path(key)
                data: bytes = self._files.cat_file(path, start=0, end=MAX_RECORD_BYTES)
            except FileNotFoundError:
                return None
        return data

    def is_sound(self, record: CommitRecord) -> bool:  # noqa: ARG002 (a folder's)
        """Whether a complete copy still is what was written; far away nothing is read for that."""
        return True

    @abstractmethod
    def begin(self, record: bytes) -> None:
        """Say what is being copied, before anything else lies there."""

    @abstractmethod
    def fill(self, source: ObjectReader, keys: Sequence[str], advance: Advance) -> None:
        """Let these objects be there, whole: those that are are left as they are."""

    @abstractmethod
    def finish(self, record: CommitRecord, card: str) -> None:
        """Declare the copy complete, once all its objects are there."""

    @abstractmethod
    def tidy(self) -> None:
        """Remove what only a copy under way needs."""

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """What any file system raises where it is first asked, as the user's mistake."""
        try:
            yield
        except GradpipeError:
            raise
        except Exception as error:
            raise InputError(
                f"cannot copy to {self.url} ({one_line(error)}): check the URL and the credentials"
            ) from error

    @contextmanager
    def _told(self, what: str = "objects") -> Iterator[None]:
        """What it raises once it has been reached."""
        try:
            yield
        except Exception as error:
            raise GradpipeError(
                f"cannot copy {what} to {self.url} ({one_line(error)}): run the same command "
                "again, which goes on from there"
            ) from error


class FolderDestination(Destination):
    """A local folder, written as durably as a collection's."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.folder = Path(self._root)
        self._objects = ObjectWriter(self.folder)

    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the folder's lock."""
        return locked(self.folder / LOCK_NAME, of=self.folder, wait=False)

    def names(self) -> set[str]:
        """As `Destination`; what a copy left that was killed before it began is nothing."""
        begun = {path.name for path in (self.folder / PARTIAL).glob("*")}
        return super().names() - (set() if begun - {f".{Path(COPY_KEY).name}.tmp"} else {PARTIAL})

    def read(self, key: str) -> bytes | None:
        """As `Destination`."""
        path = self.folder / key
        return path.read_bytes() if path.is_file() else None

    def is_sound(self, record: CommitRecord) -> bool:
        """Whether every object is there, with its digest."""
        objects = record.objects.items()
        return all((self.folder / x).is_file() and self._digest(x) == of for x, (_, of) in objects)

    def begin(self, record: bytes) -> None:
        """As `Destination`."""
        self._objects.write(COPY_KEY, record)

    def fill(self, source: ObjectReader, keys: Sequence[str], advance: Advance) -> None:
        """As `Destination`."""
        there = {key for key in keys if (self.folder / key).is_file()}
        _fill(source, keys, there, self._objects.write, self._digest, advance)

    def finish(self, record: CommitRecord, card: str) -> None:  # noqa: ARG002 (the Hub's)
        """As `Destination`."""
        self._objects.record = record
        self._objects.commit()

    def tidy(self) -> None:
        """As `Destination`."""
        tidy(self.folder)

    def _digest(self, key: str) -> str:
        return digest((self.folder / key).read_bytes())


class BucketDestination(Destination):
    """An object store."""

    def begin(self, record: bytes) -> None:
        """As `Destination`."""
        with self._reached():
            self._files.pipe_file(self._path(COPY_KEY), record)

    def fill(self, source: ObjectReader, keys: Sequence[str], advance: Advance) -> None:
        """As `Destination`."""
        with self._reached():
            found = self._files.find(self._root, detail=True)
        sizes = {path.removeprefix(f"{self._root}/"): x["size"] for path, x in found.items()}
        there = {key for key in keys if sizes.get(key) == source.record.objects[key][0]}
        _fill(source, keys, there, self._write, self._digest, advance)

    def finish(self, record: CommitRecord, card: str) -> None:  # noqa: ARG002 (the Hub's)
        """As `Destination`."""
        _send(COMMIT_KEY, record.to_bytes(), self._write, self._digest)

    def tidy(self) -> None:
        """As `Destination`."""
        with self._told(COPY_KEY):
            self._files.rm_file(self._path(COPY_KEY))

    def _write(self, key: str, data: bytes) -> None:
        with self._told(key):
            self._files.pipe_file(self._path(key), data)

    def _digest(self, key: str) -> str:
        with self._told(key):
            return digest(self._files.cat_file(self._path(key), start=0))  # in one request


def _fill(
    source: ObjectReader,
    keys: Sequence[str],
    there: set[str],
    write: Callable[[str, bytes], None],
    digest_of: Callable[[str], str],
    advance: Advance,
) -> None:
    """Write and read back, several objects at once; of those `there` only the second."""

    def bring(key: str) -> None:
        size, expected = source.record.objects[key]
        if key not in there or digest_of(key) != expected:
            _send(key, source.read(key, size), write, digest_of)
        advance(1)

    is_large = {key: source.record.objects[key][0] >= _LARGE_BYTES for key in keys}
    _side_by_side(_AT_ONCE, bring, (key for key in keys if not is_large[key]))
    _side_by_side(_LARGE_AT_ONCE, bring, (key for key in keys if is_large[key]))


def _send(
    key: str,
    data: bytes,
    write: Callable[[str, bytes], None],
    digest_of: Callable[[str], str],
) -> None:
    """Write an object until it is there as it was sent: a few times."""
    for _ in range(_TRIES):
        write(key, data)
        if digest_of(key) == digest(data):
            return
    raise GradpipeError(
        f"object {key} did not arrive as it was sent, {_TRIES} times: run the same command again, "
        "which goes on from there"
    )


def _side_by_side(count: int, work: Callable[[str], None], keys: Iterable[str]) -> None:
    """Do this with every key, so many at once; when one fails, those that wait are dropped."""
    pool = ThreadPoolExecutor(count)
    try:
        for _ in pool.map(work, keys):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
