"""What a store's statistics look like, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from gradpipe.errors import printable
from gradpipe.pipeline.reports.results import StoreStats
from gradpipe.store.summary import QUANTILES, Summary


def stats_table(stats: StoreStats) -> Table:
    """Each layer, then each block: a row for what it is, and one for each of its statistics."""
    table = Table(
        title=Text(printable(f"gradient store {stats.store}")), box=None, padding=(0, 1, 0, 0)
    )
    table.add_column("layer, statistic", overflow="fold")
    shares = [f"{100 * share:g} %" for share in QUANTILES[:-1]]
    for name in (*shares, "largest", "outliers", "rank"):
        table.add_column(name, justify="right", no_wrap=True)
    for part in (stats.layers, stats.blocks):
        for summary in part:
            for row in _summary_rows(summary):
                table.add_row(*(Text(printable(x)) for x in row))
    return table


def _summary_rows(summary: Summary) -> Iterator[tuple[str, ...]]:
    is_layer = summary.num_layers == 1
    counts = {
        "layers": None if is_layer else summary.num_layers,
        "tokens": summary.num_tokens,
        "dead inputs": summary.dead_inputs,
        "unseen layers": summary.unseen or None,
    }
    yield (summary.name,)
    yield (", ".join(f"{x:,} {name}" for name, x in counts.items() if x is not None),)
    for name in (*summary.spreads, *summary.ranks):
        spread, rank = summary.spreads.get(name), summary.ranks.get(name)
        norms = [""] * 5 if spread is None else [f"{x:.1e}" for x in spread.quantiles]
        if spread is not None:
            norms.append(f"{spread.outliers:.2%}")
        yield (f"  {name}", *norms, "" if rank is None else f"{rank:.1f}")
