"""Pictures: drawn once by matplotlib, shown as SVG in a page and written as SVG and PNG.

In a page, lines and letters take the colour of the text around them, light or dark; text stays
text, and a screen reader finds title and description. Series have the colours of Okabe and Ito
(2008), which the colour-blind can tell apart, and markers of their own.
"""

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from gradpipe.errors import printable
from gradpipe.store.objects import write_durably

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_INK = "#123456"  # stands for the colour of the text, which a page decides
_PAPER_INK = "#222222"  # in files
_STYLE = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    "lines.markersize": 5,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # names may hold dollars
    "svg.fonttype": "none",
}
# the same picture, the same bytes
_UNDATED = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """What is to be drawn, and what is to be said of it."""

    name: str  # of its files, and of its parts in a page
    title: str
    alt: str  # what is to be seen, for those who do not see it
    draw: Callable[[Figure], None]
    width: float = 5.0  # inches: letters are as large as the page's on a phone
    height: float = 3.3

    def inline(self) -> Markup:
        """An `<svg>` for a page: titled, of the page's ink, its ids its own."""
        text = self._render("svg", _INK).decode()
        body = re.sub(r"^.*?<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", "", text, flags=re.DOTALL)
        [box] = re.findall(r"<svg[^>]*?viewBox=\"([^\"]*)\"", text)
        body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
        body = re.sub(r"(?<= )(id=\"|xlink:href=\"#|href=\"#)", rf"\g<1>{self.name}-", body)
        body = body.replace("url(#", f"url(#{self.name}-").replace(_INK, "currentColor")
        title, alt = (escape(printable(x)) for x in (self.title, self.alt))
        return Markup(  # noqa: S704 (matplotlib escapes the text that it draws)
            f'<svg role="img" viewBox="{box}" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'aria-labelledby="{self.name}-title {self.name}-alt">'
            f'<title id="{self.name}-title">{title}</title><desc id="{self.name}-alt">{alt}</desc>'
            f"{body}"
        )

    def save(self, folder: Path, kinds: tuple[str, ...] = ("svg", "png")) -> None:
        """Write it under its name."""
        for kind in kinds:
            write_durably(folder / f"{self.name}.{kind}", self._render(kind, _PAPER_INK))

    def _render(self, kind: str, ink: str) -> bytes:
        style: Any = _STYLE | dict.fromkeys(_INKED, ink)
        written = io.BytesIO()
        with mpl.rc_context(style | {"svg.hashsalt": self.name}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks
            figure = Figure(figsize=(self.width, self.height))
            self.draw(figure)
            figure.savefig(
                written, format=kind, dpi=150, transparent=kind == "svg", metadata=_UNDATED[kind]
            )
        return written.getvalue()
