"""A report as sections of text, pictures and tables, whatever it is written as."""

from dataclasses import dataclass

from gradpipe.pipeline.reports.pictures import Picture

Cell = str | float | int | None  # numbers sort as numbers; None is nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class DataTable:
    """Rows to read, sort and copy."""

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading and what is below it."""

    title: str
    text: tuple[str, ...] = ()  # paragraphs
    commands: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[DataTable, ...] = ()

    @property
    def is_empty(self) -> bool:
        """True if nothing stands below the heading."""
        return not (self.text or self.commands or self.pictures or self.tables)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """The whole report."""

    title: str
    made_with: str
    sections: tuple[Section, ...]

    @property
    def pictures(self) -> list[Picture]:
        """In the order of the sections."""
        return [picture for section in self.sections for picture in section.pictures]


def shown(cell: Cell) -> str:
    """A cell as it is read: four decimals of a share, two of what is larger."""
    if cell is None:
        return ""
    if isinstance(cell, float):
        digits = ".4f" if abs(cell) <= 1 else ",.2f" if abs(cell) < 1e6 else ".4g"
        return f"{cell:{digits}}"
    return f"{cell:,}" if isinstance(cell, int) else cell
