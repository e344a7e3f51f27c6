"""A finished store described, layer by layer and block by block."""

from itertools import groupby

from rich.console import Console

from gradpipe.pipeline.progress import QUIET, counted
from gradpipe.pipeline.reports.results import StoreStats
from gradpipe.pipeline.stores.config import StatsConfig
from gradpipe.pipeline.stores.layers import chosen_layers
from gradpipe.store.reader import GradientStore
from gradpipe.store.summary import block_of, summary_of


def stats(config: StatsConfig, console: Console = QUIET) -> StoreStats:
    """Read every statistic of the layers, one layer at a time.

    Raises InputError for no store or no such layer, StoreError for a damaged one.
    """
    store = GradientStore.open(config.store)
    layers = chosen_layers(store, config.layer)
    with store.reading_ahead(layers):
        read = counted(layers, console, "reading", len(layers), "layers")
        found = [(layer, summary_of(store, layer)) for layer in read]
    found.sort(key=lambda pair: (pair[0].block is None, pair[0].block or 0))
    blocks = groupby(found, key=lambda pair: pair[0].block)
    return StoreStats(
        store=store.url,
        digest=store.digest,
        layers=tuple(summary for _, summary in found),
        blocks=tuple(
            block_of("outside" if block is None else f"block {block}", pairs)
            for block, pairs in blocks
        ),
    )
