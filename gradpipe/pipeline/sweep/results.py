"""`results.jsonl`: a line for each point that is done, appended by any number of processes.

A line counts once its newline is there. What a killed process left without one is cut off by the
next that writes; all hold a lock meanwhile, so that nothing whole is ever cut.
"""

import json
import os
from pathlib import Path

from gradpipe.errors import InputError
from gradpipe.pipeline.places import check_apart, check_local
from gradpipe.pipeline.reports.points import RESULTS, PointResult, read_points
from gradpipe.store.lock import locked
from gradpipe.store.objects import disk_errors

_LOCK = ".results.lock"


class ResultsFile:
    """The results in a sweep's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.path = folder / RESULTS

    def check(self, sources: tuple[Path, ...]) -> None:
        """Raises InputError unless the folder is free, or a sweep's, and holds no source."""
        check_local("OUT", self._folder)
        check_apart(self._folder, sources)
        if self._folder.exists() and not self._folder.is_dir():
            raise InputError(f"OUT {self._folder} is a file, expected a folder to create")
        names = {path.name for path in self._folder.iterdir()} if self._folder.exists() else set()
        if RESULTS not in names and names - {_LOCK}:
            raise InputError(f"OUT {self._folder} holds files, and no {RESULTS}: give another name")

    def read(self) -> dict[str, PointResult]:
        """What is done, by key; InputError for a line that is no point."""
        if not self.path.exists():
            return {}
        found: dict[str, PointResult] = {}
        for result in read_points(self.path, "mend or remove it, or give another OUT"):
            found.setdefault(result.key, result)
        return found

    def append(self, result: PointResult) -> None:
        """Add a point, whole and durable, unless another process did.

        GradpipeError if the disk fails.
        """
        line = json.dumps(result.to_json(), allow_nan=False, ensure_ascii=False)
        with (
            disk_errors(f"cannot write {self.path}", "make room or mend it"),
            locked(self._folder / _LOCK, of=self._folder, wait=True),
            self.path.open("a+b") as file,
        ):
            _cut_torn_line(file.fileno())
            if result.key not in self.read():
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())


def _cut_torn_line(descriptor: int) -> None:
    size = os.fstat(descriptor).st_size
    data = os.pread(descriptor, size, 0)
    os.ftruncate(descriptor, data.rfind(b"\n") + 1)
