"""Documents: the values of tables' columns, each made into text when it is asked for."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from gradpipe.errors import InputError


class OddValueError(Exception):
    """What is wrong with a row's value: "holds …"."""


class Reader:
    """Makes text of the values of a column: takes them as they are."""

    is_chat = False  # its texts have their special tokens already
    expected = "text"  # what the values should be

    def check(self, value: object) -> object:
        """Raises OddValueError that says what is wrong with a value, as far as is cheap to see."""
        if not isinstance(value, str):
            raise OddValueError(f"holds {type(value).__name__}")
        check_characters(value)
        return value

    def read(self, value: object) -> str:
        """The text of a value; OddValueError says what is wrong with it."""
        return str(self.check(value))


def check_characters(text: str) -> None:
    """Raises OddValueError for what no tokenizer takes."""
    if re.search("[\ud800-\udfff]", text):
        raise OddValueError("holds half a surrogate pair")


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of one table, or a single text."""

    name: str  # of the file or data set
    column: str
    values: Sequence[Any]
    reader: Reader

    def check(self) -> None:
        """Raises InputError that names the first row that is not what its reader expects."""
        for index, value in enumerate(self.values):
            try:
                self.reader.check(value)
            except OddValueError as error:
                raise self._odd(index, error) from error

    def text(self, index: int, value: object) -> str:
        """The text of a row; InputError names it if there is none."""
        try:
            return self.reader.read(value)
        except OddValueError as error:
            raise self._odd(index, error) from error

    def _odd(self, index: int, error: OddValueError) -> InputError:
        return InputError(
            f"dataset {self.name}: row {index + 1} {error} under {self.column!r}, expected "
            f"{self.reader.expected}: mend it, or choose with --text-column"
        )


class Documents(Sequence[str]):
    """The documents of several columns, in order."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns
        self._stops = [*accumulate(len(column.values) for column in columns)]

    def __len__(self) -> int:
        return self._stops[-1] if self._stops else 0

    def __getitem__(self, index: Any) -> Any:
        place = bisect_right(self._stops, index)
        column = self._columns[place]
        row = index - (self._stops[place] - len(column.values))
        return column.text(row, column.values[row])

    def __iter__(self) -> Iterator[str]:
        for column in self._columns:
            for row, value in enumerate(column.values):
                yield column.text(row, value)
