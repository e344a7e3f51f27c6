"""The lock of what is written: one writer, whether the other is a process or a thread."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gradpipe import InputError
from gradpipe.store.lock import locked


def test_a_thread_is_refused_what_another_holds(tmp_path: Path) -> None:
    """The kernel counts both as one holder; the path may be written in another way."""
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)

    def take() -> None:
        with locked(tmp_path / "link" / "lock", of=tmp_path, wait=False):
            pass

    with ThreadPoolExecutor(1) as pool:
        with locked(tmp_path / "lock", of=tmp_path, wait=False):
            with pytest.raises(InputError, match="being written by another thread"):
                pool.submit(take).result()
            assert (tmp_path / "lock").exists()
        pool.submit(take).result()
    assert not (tmp_path / "lock").exists()


def test_threads_that_wait_come_one_after_the_other(tmp_path: Path) -> None:
    """What each reads and writes under the lock is whole."""
    count = tmp_path / "count"
    count.write_text("0")

    def add(_: int) -> None:
        with locked(tmp_path / "lock", of=tmp_path, wait=True):
            count.write_text(str(int(count.read_text()) + 1))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(200)))
    assert count.read_text() == "200"
