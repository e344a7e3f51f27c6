"""One writer at a time: a lock file that names its holder, and that a dead one does not keep."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock

from gradpipe.errors import InputError
from gradpipe.store.objects import disk_errors

_THREADS: dict[Path, Lock] = {}  # the kernel's locks are the process's, whose threads share them
os.register_at_fork(after_in_child=_THREADS.clear)  # a child has none of those threads


@contextmanager
def locked(path: Path, *, of: Path, wait: bool) -> Iterator[None]:
    """Hold the lock `path` of what is written, `of`; its file, never a link's, is gone afterwards.

    The kernel releases it when its holder dies, on network file systems too. Raises InputError
    that names the holder if it is taken and `wait` is False.
    """
    failing = partial(disk_errors, f"cannot lock {path}", "make room or give another folder")
    with failing():
        path.parent.mkdir(parents=True, exist_ok=True)
    ours = _THREADS.setdefault(path.parent.resolve() / path.name, Lock())
    if not ours.acquire(blocking=wait):
        raise InputError(_taken(of, "another thread of this process"))
    try:
        with failing():
            descriptor = _acquire(path, of, wait=wait)
        try:
            yield
        finally:
            if _is_current(path, descriptor):  # else it was removed, and may be another's by now
                path.unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        ours.release()


def _taken(of: Path, holder: str) -> str:
    return f"{of} is being written by {holder}: wait for it, or stop it"


def _acquire(path: Path, of: Path, *, wait: bool) -> int:
    """A descriptor of the locked file; waits or raises if another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise InputError(_taken(of, holder or "another process")) from error
        if _is_current(path, descriptor):
            try:
                os.ftruncate(descriptor, 0)
                holder = f"process {os.getpid()} on {socket.gethostname()}\n"
                os.pwrite(descriptor, holder.encode(), 0)
            except OSError:
                os.close(descriptor)
                raise
            return descriptor
        os.close(descriptor)  # its holder removed it while we waited


def _is_current(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
