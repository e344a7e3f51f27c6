"""What the pictures of a report show: curves, blocks, layers, masks, scores, ranks."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from gradpipe.errors import printable
from gradpipe.pipeline.reports.facts import LayerFacts, MaskFact, ScoreFact
from gradpipe.pipeline.reports.kinds import block_of, by_number, kind_of
from gradpipe.pipeline.reports.pictures import COLOURS, MARKERS, Picture
from gradpipe.pipeline.reports.series import Series, Sweep

_TALLEST = 12.0  # inches
_TICKS = 8  # of an axis of blocks, at most
_TOLD = 12  # of a picture's ends, in words
_LONGEST = 42  # letters of a name in a picture
_LINES = ("-", "--", "-.")
_MAP = "cividis"  # dark to bright, and alike for the colour-blind


def sweep(found: Sweep, name: str) -> Picture:
    """The measure against what was varied, a line for each way to prune; dots if nothing was."""
    how = f"A line for each of {len(found.series)} ways to prune"
    if found.rows:
        how = f"{len(found.rows)} ways to prune, a dot for each target"
    dense = "" if found.dense is None else f" Dense: {found.dense:.4g}."
    return Picture(
        name=name,
        title=f"{found.measure} by {found.axis or 'method'}, {found.title}",
        alt=f"{how}.{dense} Best first: {_best(found)}",
        draw=partial(_draw_dots if found.rows else _draw_curves, found),
        height=min(_TALLEST, 3.6 + 0.2 * max(len(found.rows), len(found.series) / 2)),
    )


def _best(found: Sweep) -> str:
    """The last of each line, or all dots, as far as anyone would listen."""
    ends = [
        (
            value,
            f"{found.rows[int(x)]} at {series.name}" if found.rows else f"{series.name} at {x:g}",
        )
        for series in found.series
        for x, value in list(zip(series.points, series.values, strict=True))[
            -len(found.rows or (0,)) :
        ]
    ]
    ends.sort(reverse=found.is_better_higher)
    return "; ".join(f"{name}: {value:.4g}" for value, name in ends[:_TOLD])


def _draw_curves(found: Sweep, figure: Figure) -> None:
    axes = figure.add_subplot()
    numbers = {name: i for i, name in enumerate(dict.fromkeys(x.name for x in found.series))}
    for series in found.series:
        _line(axes, numbers[series.name], series)
    if found.dense is not None:
        axes.axhline(found.dense, linestyle=":", color=_ink(axes), label="dense")
    if _is_wide(found):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    if found.axis in {"α", "samples"}:
        axes.set_xscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_tick)
    axes.set_xlabel(found.axis)
    axes.set_ylabel(found.measure)
    _legend(figure, [series.name for series in found.series])


def _draw_dots(found: Sweep, figure: Figure) -> None:
    axes = figure.add_subplot()
    for number, series in enumerate(found.series):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        label = _short(series.name)
        axes.plot(series.values, series.points, marker, color=colour, markersize=7, label=label)
    if found.dense is not None:
        axes.axvline(found.dense, linestyle=":", color=_ink(axes), label="dense")
    if _is_wide(found):
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_tick)
    axes.set_yticks(range(len(found.rows)), [_short(row) for row in found.rows])
    axes.invert_yaxis()
    axes.set_xlabel(found.measure)
    _legend(figure, [series.name for series in found.series])


def _tick(value: float, _: float = 0.0) -> str:
    """A number beside an axis, as short as it can be."""
    return f"{value:g}" if value < 10_000 else f"{value:.0e}".replace("e+0", "e")


def _is_wide(found: Sweep) -> bool:
    """True if values differ by more than a factor of ten."""
    values = [value for series in found.series for value in series.values if value > 0]
    return bool(values) and max(values) > 10 * min(values) and not found.is_better_higher


def _legend(figure: Figure, names: Iterable[str]) -> None:
    """Below, in two columns where names are short."""
    is_short = max(map(len, map(_short, names)), default=0) < _LONGEST // 2
    figure.legend(loc="outside lower center", ncols=2 if is_short else 1)


def _line(axes: Axes, number: int, series: Series) -> None:
    """Points of a pattern are no curve: they stand alone, hollow, in the colour of their line."""
    colours = (*COLOURS, _ink(axes))
    axes.plot(
        series.points,
        series.values,
        color=colours[number % len(colours)],
        marker=MARKERS[number % len(MARKERS)],
        fillstyle="none" if series.is_pattern else "full",
        linestyle="none" if series.is_pattern else _LINES[number // len(colours) % len(_LINES)],
        label=_short(series.name + (", n:m" if series.is_pattern else "")),
    )


def _ink(axes: Axes) -> Any:
    """The colour of the text, which a page decides."""
    return axes.xaxis.label.get_color()


def by_block(
    name: str, title: str, unit: str, values: Mapping[str, Mapping[str, float]]
) -> Picture:
    """A line for each of several outputs or statistics over the blocks; `values` by block."""
    blocks = sorted({block for some in values.values() for block in some}, key=by_number)
    told = "; ".join(f"{label}: {_range(some)}" for label, some in values.items())

    def draw(figure: Figure) -> None:
        """A line for each, over the blocks."""
        axes = figure.add_subplot()
        for number, (label, some) in enumerate(values.items()):
            places = [place for place, block in enumerate(blocks) if block in some]
            found = [some[block] for block in blocks if block in some]
            _line(axes, number, Series(label, tuple(places), tuple(found)))
        _block_axis(axes, blocks)
        axes.set_ylabel(unit)
        if len(values) > 1:
            _legend(figure, values)

    return Picture(name=name, title=title, alt=f"Over {len(blocks)} blocks. {told}", draw=draw)


def _range(values: Mapping[str, float]) -> str:
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return f"{values[low]:.4g} ({low}) to {values[high]:.4g} ({high})"


def _block_axis(axes: Axes, blocks: Sequence[str]) -> None:
    step = -(-len(blocks) // _TICKS)
    places = list(range(0, len(blocks), step))
    axes.set_xticks(places, [_number(blocks[place]) for place in places])
    axes.set_xlabel("block")


def _number(block: str) -> str:
    """What tells a block from others: its number."""
    found = re.search(r"\d+$", block)
    return found[0] if found else _short(block)


def by_layer(
    name: str,
    title: str,
    unit: str,
    values: Mapping[str, float],
    limits: tuple[float, float] | None = None,
) -> Picture:
    """A cell for each layer: kinds of layer against blocks; where one has several, their mean.

    `limits` are of the colours, where several pictures are to be compared.
    """
    blocks = sorted({block_of(x) for x in values}, key=by_number)
    kinds = list(dict.fromkeys(map(kind_of, values)))
    cells: dict[tuple[str, str], list[float]] = {}
    for layer, value in values.items():
        cells.setdefault((kind_of(layer), block_of(layer)), []).append(value)
    grid = np.array(
        [[np.mean(cells.get((kind, block), math.nan)) for block in blocks] for kind in kinds]
    )

    def draw(figure: Figure) -> None:
        """Kinds of layer by blocks, as colours."""
        axes = figure.add_subplot()
        low, high = limits or (None, None)
        drawn = axes.imshow(
            grid, cmap=_MAP, vmin=low, vmax=high, aspect="auto", interpolation="none"
        )
        axes.grid(visible=False)
        axes.set_yticks(range(len(kinds)), [_short(kind) for kind in kinds])
        _block_axis(axes, blocks)
        figure.colorbar(drawn, ax=axes, label=unit)

    height = min(_TALLEST, 1.4 + 0.3 * len(kinds))
    alt = f"{len(kinds)} kinds of layer by {len(blocks)} blocks: {_range(values)}"
    return Picture(name=name, title=title, alt=alt, draw=draw, height=height)


def masks(layer: LayerFacts, name: str) -> Picture:
    """Masks of one layer side by side: bright where weights are kept."""
    told = "; ".join(f"{x.title}: {_structure(x)}" for x in layer.masks)
    num_rows = -(-len(layer.masks) // 2)
    height, width = layer.masks[0].kept.shape

    def draw(figure: Figure) -> None:
        """A mask a panel, two beside each other."""
        for place, fact in enumerate(layer.masks):
            axes = figure.add_subplot(num_rows, 2, place + 1)
            axes.imshow(fact.kept, cmap=_MAP, vmin=0, vmax=1, interpolation="none")
            axes.grid(visible=False)
            axes.set_title(_short(fact.title))
            axes.set_xlabel("input")
            axes.set_ylabel("output")
            _cell_ticks(axes, layer.shape, fact.kept.shape)

    return Picture(
        name=name,
        title=f"Masks of {layer.name}",
        alt=f"Kept weights are bright, pruned ones dark. {told}",
        draw=draw,
        height=min(_TALLEST, num_rows * (0.9 + 2.2 * min(height / width, 2.0))),
    )


def _cell_ticks(axes: Axes, shape: Iterable[int], cells: Iterable[int]) -> None:
    """Numbers of outputs and inputs, where a cell is many of them."""
    sizes = [(size, count, size / count) for size, count in zip(shape, cells, strict=True)]
    for axis, (size, count, each) in zip((axes.yaxis, axes.xaxis), sizes, strict=True):
        axis.set_ticks([-0.5, (count - 1) / 2, count - 0.5], ["0", f"{size // 2}", f"{size}"])
        axis.set_tick_params(length=2 if each == 1 else 3)


def _structure(mask: MaskFact) -> str:
    """How much rows and columns differ, which the eye sees as stripes."""
    rows, columns = mask.kept.mean(axis=1), mask.kept.mean(axis=0)
    return (
        f"{mask.kept.mean():.1%} kept, between {rows.min():.0%} and {rows.max():.0%} of an output, "
        f"{columns.min():.0%} and {columns.max():.0%} of an input"
    )


def scores(layer: str, fact: ScoreFact, name: str) -> Picture:
    """Weights by their score, those that were pruned and those that were kept, and the cut."""

    def draw(figure: Figure) -> None:
        """Two histograms, and the thresholds over them."""
        axes = figure.add_subplot()
        for counts, colour, label, hatch in (
            (fact.pruned, COLOURS[1], "pruned", "////"),
            (fact.kept, COLOURS[0], "kept", None),
        ):
            axes.stairs(
                counts, fact.edges, fill=True, alpha=0.7, color=colour, label=label, hatch=hatch
            )
        if fact.cuts is not None:
            low, middle, high = fact.cuts
            axes.axvline(middle, linestyle="--", color=_ink(axes), label="cut (median of groups)")
            label = "cuts, 5 % to 95 % of groups"
            axes.axvspan(low, high, color=_ink(axes), alpha=0.12, label=label)
        axes.set_xlabel("log₁₀ of the score")
        axes.set_ylabel("weights")
        figure.legend(loc="outside lower center", ncols=2)

    cut = "" if fact.cuts is None else f" The cut lies at {fact.cuts[1]:.3g}."
    alt = (
        f"{fact.kept.sum():,} weights kept and {fact.pruned.sum():,} pruned, from "
        f"{fact.edges[0]:.3g} to {fact.edges[-1]:.3g}.{cut} {fact.num_zero:,} more score 0."
    )
    return Picture(name=name, title=f"Scores of {layer}, {fact.title}", alt=alt, draw=draw)


def _short(text: str) -> str:
    """A name as pictures have it: whole where it fits, else its end, which tells more."""
    shown = printable(text)
    return shown if len(shown) <= _LONGEST else f"…{shown[1 - _LONGEST :]}"
