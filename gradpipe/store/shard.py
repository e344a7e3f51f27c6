"""One part of N: which samples, or which files, are one worker's."""

from dataclasses import dataclass
from typing import Self

from gradpipe.errors import InputError

_EXPECTED = "I/N with 0 ≤ I < N, such as 0/8"


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` independent jobs, each with its own part of the samples."""

    index: int
    count: int

    def __post_init__(self) -> None:
        """Raises InputError for one that is none of N."""
        if not 0 <= self.index < self.count:
            raise InputError(f"shard {self.index}/{self.count}: expected {_EXPECTED}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The shard in `3/8`, counted from 0; InputError for anything else."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal()):
            raise InputError(f"shard {text}: expected {_EXPECTED}")
        return cls(int(index), int(count))

    @property
    def name(self) -> str:
        """Folder name: `3-of-8`."""
        return f"{self.index}-of-{self.count}"

    def part_of(self, total: int) -> range:
        """Its samples, or files, out of `total`: a run of consecutive ones."""
        return range(self.index * total // self.count, (self.index + 1) * total // self.count)
