"""The documentation: examples run, links lead somewhere, commands are ones that `pipe` has."""

from __future__ import annotations

import doctest
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gradpipe import CollectConfig, DataConfig, collect
from gradpipe.store import arrays
from tests.support.commands import COMMANDS, FLAGS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_COMMAND = re.compile(r"^(?:\$|srun) pipe (.+)$", re.MULTILINE)
_FLAG = re.compile(r"`(--[a-z][a-z0-9-]*)")


def read(name: str) -> str:
    """A page's text."""
    return (ROOT / name).read_text(encoding="utf-8")


def prose(name: str) -> str:
    """A page's text without its fenced blocks."""
    return _FENCED.sub("", read(name))


def anchors(name: str) -> set[str]:
    """The anchors of a page's headings, as GitHub derives them."""
    titles = [
        re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in _HEADING.findall(prose(name))
    ]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(name: str) -> Iterator[list[str]]:
    """The words after `pipe` in each command that a page's console blocks and scripts show."""
    for language, block in _FENCED.findall(read(name)):
        if language in {"console", "bash"}:
            yield from map(shlex.split, _COMMAND.findall(block.replace("\\\n", " ")))


def test_every_decision_is_listed_by_its_title() -> None:
    """The index says what each decision says of itself, in order."""
    listed = re.findall(
        r"^(\d+)\. \[(.+)\]\(decisions/(.+)\)$", read("docs/README.md"), re.MULTILINE
    )
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [name for _, _, name in listed] == [page.name for page in pages]
    for (number, title, _), page in zip(listed, pages, strict=True):
        assert page.read_text().startswith(f"# {number}. {title}\n")


@pytest.mark.parametrize("name", ["README.md", "docs/store-format.md"])
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the examples print is what the page shows, in an empty folder or beside a store."""
    monkeypatch.chdir(tmp_path)
    if name != "README.md":  # the README makes its own
        text = DataConfig(name="stdlib")
        config = CollectConfig(
            model="embedded", store=Path("store"), data=text, num_samples=2, seq_len=64
        )
        collect(config)
    source = re.sub(r"^```.*$", "", read(name), flags=re.MULTILINE)  # a fence is no output
    test = doctest.DocTestParser().get_doctest(source, {}, name, name, 0)
    assert test.examples
    report: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert not report, "".join(report)


def test_array_metadata_is_what_the_format_shows() -> None:
    """The format's two examples, one chunk and a shard of several, are what the writer writes."""
    blocks = _FENCED.findall(read("docs/store-format.md"))
    _, one, several = (json.loads(block) for language, block in blocks if language == "json")
    for shown in (one, several):
        array = np.zeros(shown["shape"], shown["data_type"])
        written = json.loads(arrays.encode_array(array)["zarr.json"])
        assert written | shown == written
    assert one.keys() == written.keys()


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    """Every relative link names a file in the repository, and a heading in it if it says so."""
    targets = [link for link in _LINK.findall(prose(name)) if "://" not in link]
    for target in targets:
        path, _, anchor = target.partition("#")
        page = (ROOT / name).parent / path if path else ROOT / name
        assert page.resolve().is_relative_to(ROOT), target
        assert page.exists(), target
        if anchor:
            assert anchor in anchors(page.resolve().relative_to(ROOT).as_posix()), target


def test_every_page_is_linked() -> None:
    """From the README, link by link, a reader reaches each page of the documentation."""
    reached, waiting = set[Path](), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            links = _LINK.findall(page.read_text(encoding="utf-8"))
            waiting += [
                (page.parent / x.partition("#")[0]).resolve() for x in links if ":" not in x
            ]
    assert set(PAGES) <= reached


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_ones_that_pipe_has(name: str) -> None:
    """Each command shown is parsed by the command line itself, arguments and options."""
    for words in commands(name):
        length = 1 if words[0] in COMMANDS else 2
        name = " ".join(words[:length])
        COMMANDS[name].make_context(name, words[length:])


def test_every_command_is_shown() -> None:
    """There is an example of each command on some page."""
    shown = {" ".join(words[:n]) for name in NAMES for words in commands(name) for n in (1, 2)}
    assert COMMANDS.keys() <= shown


@pytest.mark.parametrize("name", NAMES)
def test_flags_are_ones_that_pipe_has(name: str) -> None:
    """Each option named in the text belongs to some command."""
    assert set(_FLAG.findall(prose(name))) <= FLAGS | {"--help", "--version"}


@pytest.mark.parametrize("name", [name for name in NAMES if "/decisions/" in name])
def test_a_decision_is_short(name: str) -> None:
    """A decision fits a screen: context, decision, consequences, what was rejected."""
    text = read(name)
    assert len(text.splitlines()) <= 40
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == [
        "Context",
        "Decision",
        "Consequences",
        "Rejected",
    ]
