"""Results as tables for a terminal."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from gradpipe.errors import printable
from gradpipe.pipeline.reports.kinds import is_alike, summary
from gradpipe.pipeline.reports.results import (
    DemoResult,
    Health,
    ModelReport,
    PruneResult,
    StoreStats,
    Zeros,
)
from gradpipe.store.facts import facts_of
from gradpipe.store.reader import GradientStore
from gradpipe.store.summary import QUANTILES, Summary


def store_table(store: GradientStore) -> Table:
    """What a store holds, and of what."""
    return _rows(f"gradient store {store.url}", facts_of(store))


def prune_table(out: str, results: Sequence[PruneResult]) -> Table:
    """Zeros found for each target: a line a kind of layer, or a block where blocks differ."""
    by_kind = all(is_alike(result.layers) for result in results)
    lines = [summary(result.layers, by_kind=by_kind) for result in results]
    reports = [result.report for result in results]
    table = Table(title=as_text(out))
    table.add_column("kind of layer" if by_kind else "block")
    table.add_column("layers", justify="right")
    for result in results:
        table.add_column(as_text(result.label), justify="right")
    for name, layers in lines[0].items():
        table.add_row(as_text(name), f"{len(layers)}", *_shares(Zeros.sum(x[name]) for x in lines))
    table.add_section()
    table.add_row("asked for", "", *(f"{x.requested:.4f}" for x in reports))
    table.add_row("total", f"{len(results[0].layers)}", *(f"{x.achieved:.4f}" for x in reports))
    table.add_row("of all of the blocks", "", *_shares(x.blocks for x in reports))
    table.add_row("of the whole file", "", *_shares(x.file for x in reports))
    return table


def _shares(parts: Iterable[Zeros]) -> list[str]:
    return [f"{part.sparsity:.4f}" for part in parts]


def layer_table(result: PruneResult) -> Table:
    """Sparsity asked for and found, of each layer and in total.

    The total is of the pruned layers, then of all weights of the blocks, then of the checkpoint.
    """
    report = result.report
    totals = (result.achieved, report.blocks.sparsity, report.file.sparsity)
    table = Table(title=as_text(f"{result.folder}"), show_footer=True)
    table.add_column("layer", "total\nof all of the blocks\nof the whole file")
    table.add_column("requested", f"{result.requested:.4f}", justify="right")
    table.add_column("achieved", "\n".join(f"{x:.4f}" for x in totals), justify="right")
    for layer in result.layers:
        table.add_row(as_text(layer.name), f"{layer.requested:.4f}", f"{layer.achieved:.4f}")
    return table


def plan_table(report: ModelReport) -> Table:
    """What a collection would make of a model, and what it would take."""
    return _rows("collect-grads would take", _model_rows(report))


def health_table(health: Health) -> Table:
    """What a machine has, and what it would do with a model."""
    devices = {
        name: f"{kind}, {_gib(health.free_memory[name])} free"
        for name, kind in health.devices.items()
    }
    rows = health.versions | devices | {"disk": f"{_gib(health.free_disk)} free here"}
    return _rows("pipe doctor", rows | ({} if health.model is None else _model_rows(health.model)))


def _rows(title: str, rows: Mapping[str, str]) -> Table:
    table = Table(title=as_text(title), show_header=False)
    for name, value in rows.items():
        table.add_row(name, as_text(value))
    return table


def _model_rows(report: ModelReport) -> dict[str, str]:
    plan = report.estimate
    where = "devices" if plan.shares else "device"
    return {
        "model": f"{report.name} ({report.architecture}, {report.task}, {report.dtype})",
        "blocks": f"{report.num_blocks}, at {report.blocks}",
        "layers": f"{report.num_layers}, {report.num_layer_weights:,} weights",
        "stays dense": "\n".join(report.dense) or "no matrix of the blocks",
        "schedule": f"{plan.schedule} ({plan.reason})",
        "parameters": f"{plan.num_parameters:,}",
        f"memory on the {where}": f"{_gib(plan.device_bytes)} of {_gib(plan.free_bytes)} free",
        **{
            f"  on {device}": f"{_gib(share.needed_bytes)} of {_gib(share.free_bytes)} free"
            for device, share in plan.shares.items()
        },
        "  resident / streamed": f"{_gib(plan.resident_bytes)} / {_gib(plan.streamed_bytes)}",
        "memory on the host": _gib(plan.host_bytes),
        "threads": f"{plan.threads}, of OMP_NUM_THREADS, affinity and cgroup the least",
        "scratch": _gib(plan.scratch_bytes),
        "store": _gib(plan.store_bytes),
        "weights read": _gib(plan.read_bytes),
        "operations": f"{plan.flops:.2e}",
    }


def as_text(words: str) -> Text:
    """A user's or a store's words: no markup, nothing that a terminal would obey."""
    return Text(printable(words))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def demo_table(result: DemoResult) -> Table:
    """Perplexity of each method at each target."""
    table = Table(title=f"Perplexity on held-out text (dense {result.dense:.2f})")
    table.add_column("method")
    labels = next(iter(result.perplexities.values()))
    for label in labels:
        table.add_column(label, justify="right")
    for name, row in result.perplexities.items():
        table.add_row(name, *(f"{row[label]:.2f}" for label in labels))
    return table


def stats_table(stats: StoreStats) -> Table:
    """Each layer, then each block: a row for what it is, and one for each of its statistics."""
    title = as_text(f"gradient store {stats.store}")
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    table.add_column("layer, statistic", overflow="fold")
    shares = [f"{100 * share:g} %" for share in QUANTILES[:-1]]
    for name in (*shares, "largest", "outliers", "rank"):
        table.add_column(name, justify="right", no_wrap=True)
    for part in (stats.layers, stats.blocks):
        for described in part:
            for row in _summary_rows(described):
                table.add_row(*map(as_text, row))
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
