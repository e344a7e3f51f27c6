"""A report as one HTML file that asks for nothing else, and as Markdown for a model card.

What comes from files is escaped by the template engine, and the page's own policy forbids every
request, and every script but the one that it carries.
"""

import base64
import hashlib
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gradpipe.errors import printable
from gradpipe.pipeline.reports.document import DataTable, Document, Section, shown

_TEMPLATES = Path(__file__).parent / "template"
_SHOWN_ROWS = 40  # of a table in Markdown


def html(document: Document) -> str:
    """The page."""
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    engine = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda x: printable(x) if type(x) is str else x,
    )
    return engine.get_template("page.html").render(
        document=document,
        style=Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8")),  # noqa: S704 (ours)
        script=Markup(script),  # noqa: S704 (ours)
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        shown=shown,
        is_number=lambda cell: isinstance(cell, int | float),
    )


def markdown(document: Document, folder: Path | None) -> str:
    """For a model card: tables, and pictures where they were written to a folder."""
    parts = [f"# {_plain(document.title)}"]
    for section in document.sections:
        has_more = section.tables or section.commands or folder is not None
        parts += _markdown_of(section, folder) if has_more or not section.pictures else []
    return "\n\n".join([*parts, f"Made with {document.made_with}."]) + "\n"


def _markdown_of(section: Section, folder: Path | None) -> list[str]:
    pictures = [] if folder is None else section.pictures
    return [
        f"## {_plain(section.title)}",
        *map(_plain, section.text),
        *(f"    {printable(command)}" for command in section.commands),
        *(f"![{_plain(x.alt)}]({folder}/{x.name}.svg)" for x in pictures),
        *map(_markdown_table, section.tables),
    ]


def _markdown_table(table: DataTable) -> str:
    columns = range(len(table.columns))
    numbers = [any(isinstance(row[i], float | int) for row in table.rows) for i in columns]
    lines = [
        "| " + " | ".join(map(_plain, table.columns)) + " |",
        "|" + "|".join("---:" if is_number else "---" for is_number in numbers) + "|",
        *(
            "| " + " | ".join(_plain(shown(x)) for x in row) + " |"
            for row in table.rows[:_SHOWN_ROWS]
        ),
    ]
    if len(table.rows) > _SHOWN_ROWS:
        lines.append(f"\n{len(table.rows) - _SHOWN_ROWS} more rows are in the HTML report.")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no link, no end of a cell."""
    return re.sub(r"([\\`*_\[\]<>|#!])", r"\\\1", printable(text))
