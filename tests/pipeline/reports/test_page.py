"""The page in a real browser: themes, widths, keyboard, what a screen reader hears, no request."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gradpipe.pipeline.report import report
from gradpipe.pipeline.report_config import ReportConfig
from tests.support.browser import Browser, browsing, needs_chromium
from tests.support.reported import HOSTILE, point, write_points

pytestmark = needs_chromium

_ROWS = "[...document.querySelectorAll('#sweep-1 tbody tr')]"
_VALUES = f"return {_ROWS}.map(row => row.cells[3].textContent)"
_HEADING = "document.querySelectorAll('#sweep-1 .sort')[3]"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A page of a sweep whose names mean harm, shown."""
    root = tmp_path_factory.mktemp("page")
    values = {0.5: 100.5, 0.6: 9.25, 0.7: None, 0.8: 20.0}
    points = [point({"method": HOSTILE, "sparsity": s}, x) for s, x in values.items()]
    write_points(root / "sweep", [point(None, 8.0), *points])
    report(ReportConfig(out=(str(root / "sweep"),), html=root / "r.html"))
    with browsing() as started:
        started.open(root / "r.html")
        yield started


def test_nothing_is_complained_of_nothing_fetched_nothing_run(browser: Browser) -> None:
    """The console is empty; names that are markup elsewhere are text here."""
    assert browser.console() == []
    fetched = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    assert [x for x in browser.run(fetched) if not x.startswith("data:")] == []
    assert "taken" not in browser.run("return document.title").split()
    assert browser.run("return document.querySelectorAll('img, script').length") == 1
    assert HOSTILE in browser.run("return document.querySelector('#sweep-1').textContent")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_is_read_in_both_themes_and_on_a_phone(
    browser: Browser, tmp_path: Path, width: int, *, dark: bool
) -> None:
    """Nothing lies beside the screen; text, also in pictures, stands out from its ground."""
    browser.look(width=width, dark=dark)
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    paper = _brightness(browser, "document.body", "backgroundColor")
    for element in ("body", "svg text", "a", ".sort", "footer"):
        colour = "fill" if element.startswith("svg") else "color"
        ink = _brightness(browser, f"document.querySelector('{element}')", colour)
        light, shade = max(ink, paper), min(ink, paper)
        assert (light + 0.05) / (shade + 0.05) >= 4.5, element  # WCAG 2, AA
    assert (paper < 0.5) == dark
    browser.shoot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000


def _brightness(browser: Browser, element: str, style: str) -> float:
    """A colour's relative luminance, as WCAG has it."""
    text = browser.run(f"return getComputedStyle({element}).{style}")
    red, green, blue = (int(x) / 255 for x in text[text.index("(") + 1 : -1].split(",")[:3])
    parts = [
        x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in (red, green, blue)
    ]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_a_table_is_sorted_from_the_keyboard(browser: Browser) -> None:
    """As numbers, up and then down, and said so; what is missing comes last."""
    browser.run(f"{_HEADING}.focus()")
    browser.press("Enter")
    assert browser.run(_VALUES) == ["8.00", "9.25", "20.00", "100.50", ""]
    sorting = f"return {_HEADING}.closest('th').getAttribute('aria-sort')"
    assert browser.run(sorting) == "ascending"
    browser.press("Enter")
    assert browser.run(_VALUES) == ["100.50", "20.00", "9.25", "8.00", ""]
    assert browser.run(sorting) == "descending"
    assert browser.run("return document.querySelectorAll('[aria-sort]').length") == 1


def test_a_table_is_copied_from_the_keyboard(browser: Browser) -> None:
    """And a screen reader is told."""
    browser.run("document.querySelector('.copy').focus()")
    browser.press("Enter")
    told = "return document.querySelector('.copy + [role=status]').textContent"
    deadline = time.monotonic() + 20
    while not (said := browser.run(told)) and time.monotonic() < deadline:
        time.sleep(0.01)  # the clipboard answers when it will
    assert said in {"Copied.", "Selected: press Ctrl+C to copy."}


def test_all_that_scrolls_or_acts_is_reached_by_tab(browser: Browser) -> None:
    """The first stop leads past the navigation."""
    browser.run("document.activeElement.blur(); getSelection().removeAllRanges(); scrollTo(0, 0)")
    browser.run("document.body.tabIndex = -1; document.body.focus()")
    reached = []
    for _ in range(16):
        browser.press("Tab")
        reached.append(browser.run("return document.activeElement.className || 'other'"))
    assert reached[0] == "skip"
    assert {"picture", "copy", "scroll", "sort"} <= set(reached)


def test_a_screen_reader_finds_its_way(browser: Browser) -> None:
    """Language, landmarks, one first heading, captions, and a name and words for each picture."""
    assert browser.run("return document.documentElement.lang") == "en"
    tree = browser.cdp("Accessibility.getFullAXTree", {})["nodes"]
    roles = [(x["role"]["value"], x.get("name", {}).get("value", "")) for x in tree if "role" in x]
    names = {role: [name for r, name in roles if r == role] for role, _ in roles}
    assert len(names["main"]) == len(names["banner"]) == len(names["navigation"]) == 1
    assert all(names["table"])
    pictures = names.get("image", []) + names.get("img", []) + names.get("SvgRoot", [])
    assert any("A line for each of 1 ways to prune" in name for name in pictures)
    levels = browser.run("return [...document.querySelectorAll('h1, h2, h3')].map(x => x.tagName)")
    assert levels[0] == "H1"
    assert set(levels[1:]) == {"H2"}
