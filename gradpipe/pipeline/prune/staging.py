"""What is written beside OUT, by one process or by several shards, and then renamed to it.

.OUT.partial        what will be OUT
.OUT.shards         of shards: what all of them agree on, and a record of each file that is done
.OUT.lock           held by a lone process while it runs, by a shard as it begins and publishes
.OUT.I-of-N.lock    held by a shard while it runs
"""

import errno
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import count
from pathlib import Path

from gradpipe.errors import GradpipeError, InputError, Interrupted
from gradpipe.store.lock import locked
from gradpipe.store.objects import fsync, write_durably
from gradpipe.store.shard import Shard

_MANY_FILES = "ask for fewer targets at once, or allow more files (ulimit -n)"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room or give another folder"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), _MANY_FILES),
}
_ATTEMPTS, _PAUSE = 100, 0.01  # to remove a folder, and the seconds between them


class Beside:
    """What lies beside OUT: the folder that is to be it, and its locks."""

    def __init__(self, out: Path) -> None:
        self._out = out.resolve()
        self.folder = self._beside("partial")
        self._records = self._beside("shards")
        self._identity_path = self._records / "identity"
        self._old = self._beside("old")

    def _lock(self, name: str = "lock", *, wait: bool) -> AbstractContextManager[None]:
        """The lock of OUT as a whole, or of one shard; InputError names who has it."""
        return locked(self._beside(name), of=self._out, wait=wait)

    def _beside(self, name: str) -> Path:
        return self._out.parent / f".{self._out.name}.{name}"

    def _refuse_shards(self) -> None:
        """Raises InputError if shards have begun to fill the folder, and are not done."""
        if self.folder.exists() and self._identity_path.exists():
            raise InputError(
                f"{self.folder} is of another prune command, in shards: finish that one, or remove "
                f"it and {self._records}"
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Say what could not be read or written, and what to do."""
        try:
            yield
        except OSError as error:
            name, reason = str(error.filename or self._out), error.strerror or error
            if name.startswith((str(self._out), str(self._beside("")))):
                remedy = _REMEDIES.get(error.errno or 0, "give another folder")
                raise GradpipeError(
                    f"cannot write {self._out} ({name}: {reason}): {remedy}, then run the same "
                    "command again"
                ) from error
            raise GradpipeError(
                f"cannot read {name}: {reason}: restore it, then run the same command again"
            ) from error

    def begin(self) -> None:
        """Start with an empty folder."""
        for path in (self._records, self.folder):
            _remove(path)
        self.folder.mkdir(parents=True)

    def publish(self) -> None:
        """Rename the folder to OUT, in place of what was there."""
        for path in [self.folder, *(p for p in self.folder.rglob("*") if p.is_dir())]:
            fsync(path)
        _remove(self._old)
        if self._out.exists():
            self._out.rename(self._old)
        self.folder.rename(self._out)
        fsync(self._out.parent)
        self._tidy()

    def _tidy(self) -> None:
        """Remove what a published OUT has no more use for."""
        _remove(self._old)
        _remove(self._records)


class Staging(Beside):
    """The folder that one process fills."""

    def __init__(self, out: Path, check: Callable[[], None]) -> None:
        """`check` raises if OUT may not be written; it is called once nobody else can."""
        super().__init__(out)
        self._check = check

    def check(self) -> None:
        """Fail before the work as `begun` would; a killed process's lock is not left for that."""
        try:
            self._check()
        except InputError:
            if self._beside("lock").exists():
                with self._lock(wait=False):
                    pass
            raise

    @contextmanager
    def begun(self) -> Iterator[None]:
        """The folder is there, and empty; on any error it is removed."""
        parents = [path for path in self.folder.parents if not path.exists()]
        try:
            with self._errors(), self._lock(wait=False):
                self._check()
                self._refuse_shards()
                try:
                    self.begin()
                    yield
                except BaseException:
                    with suppress(OSError):  # the error that ends the run is told, not this one
                        _remove(self.folder)
                    raise
        except BaseException:
            with suppress(OSError):  # somebody else's files may be there by now
                for path in parents:
                    path.rmdir()
            raise

    @contextmanager
    def joined(self) -> Iterator[None]:
        """For a rank that writes into the folder which another has begun.

        Raises Interrupted if that one has been stopped, and has removed it.
        """
        with self._errors():
            try:
                yield
            except FileNotFoundError as error:
                if Path(str(error.filename)).is_relative_to(self.folder):
                    raise Interrupted("another rank has ended") from error
                raise


class SharedStaging(Beside):
    """A folder that several shards fill; a file counts once its record is written."""

    def __init__(
        self, out: Path, shard: Shard, identity: bytes, is_done: Callable[[], bool]
    ) -> None:
        """`identity` is what all shards must agree on; `is_done` tells if OUT is theirs.

        `is_done` raises if OUT may not be written.
        """
        super().__init__(out)
        self._shard = shard
        self._identity = identity
        self._is_done = is_done
        self.is_published = False

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Hold this shard's lock, and begin unless others have, or have finished.

        Raises InputError if another process is at this shard, or the folder is another command's.
        """
        with self._errors(), self._lock(f"{self._shard.name}.lock", wait=False):
            with self._lock(wait=True):
                self.is_published = self._is_done()
                if not self.is_published:
                    self._begin_or_join()
                elif not self.folder.exists():
                    self._tidy()  # the one that published was killed over it
            yield

    def _begin_or_join(self) -> None:
        identity = self._identity_path
        if not (self.folder.exists() and identity.exists()):
            self.begin()
            self._records.mkdir()
            write_durably(identity, self._identity)
        elif identity.read_bytes() != self._identity:
            self._refuse_shards()

    def is_written(self, file: str) -> bool:
        """True if this file is done for every target."""
        return self._record(file).exists()

    def record(self, file: str, data: bytes) -> None:
        """Count a file as done."""
        write_durably(self._record(file), data)

    def forget(self) -> None:
        """Count no file as done: what was written is not what was meant."""
        for path in self._records.glob("*.json"):
            path.unlink()

    @contextmanager
    def last_of(self, files: Sequence[str]) -> Iterator[list[bytes] | None]:
        """Every file's record, to the one shard that finds them all; else None."""
        with self._lock(wait=True):
            whole = all(self.is_written(file) for file in files)
            yield [self._record(file).read_bytes() for file in files] if whole else None

    def _record(self, file: str) -> Path:
        return self._records / f"{file}.json"


def make_folder(folder: Path, staging: Path) -> None:
    """Create `folder`, below `staging`; FileNotFoundError if that one is gone.

    So no rank makes again what the first has removed.
    """
    if folder != staging:
        make_folder(folder.parent, staging)
        folder.mkdir(exist_ok=True)


def _remove(folder: Path) -> None:
    """Delete a folder, though another rank may still put a file into it."""
    for attempt in count(1):
        try:
            if folder.exists():
                shutil.rmtree(folder)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or attempt == _ATTEMPTS:
                raise
            time.sleep(_PAUSE)
        else:
            return
