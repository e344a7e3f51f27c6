"""The sections of a report, of what outputs, sweeps and stores hold and what was measured."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version

from gradpipe.options import words
from gradpipe.pipeline.reports import figures
from gradpipe.pipeline.reports.document import Cell, DataTable, Document, Section
from gradpipe.pipeline.reports.facts import Found
from gradpipe.pipeline.reports.kinds import block_of, summary
from gradpipe.pipeline.reports.pictures import Picture
from gradpipe.pipeline.reports.points import PointResult
from gradpipe.pipeline.reports.recorded import Recorded
from gradpipe.pipeline.reports.results import Zeros
from gradpipe.pipeline.reports.series import Sweep, names_of, place_of
from gradpipe.store.reader import GradientStore

_ERRORS = (
    "How far each layer's output moves on the calibration text, relative to its size, by the "
    "store's second moments of inputs; by the inputs' norms alone where it has no hessian."
)
_OUTLIERS = (
    "Share of weights whose score |W|·‖X‖₂ is more than 5 times the mean of the block, or of the "
    "layer: what OWL allocates by."
)
_FIGURE_4 = (
    "First by the gradients alone, summed with their sign and as ℓ1: half of the layer goes "
    "(Figure 4 of GBLM-Pruner). "
)
_MASKS = (
    "Kept weights are bright, in the masks of each output. Of a large layer a cell is the share "
    "kept of several weights."
)
_SCORES = (
    "The score of each weight of the dense model, by what became of the weight. Each group is cut "
    "for itself, so that kept and pruned ones overlap."
)
_RANKS = (
    "(tr M)² / ‖M‖², between 1 and the layer's width: how many directions the inputs (hessian) or "
    "the outputs' gradients (grad_cov) use."
)
_ROUNDING = 0.02  # of a share: rows have whole numbers of weights
_MANY = 1000  # layers: beyond, a table of them all is left out of the page


def document_of(found: Found) -> Document:
    """The whole report, less sections that have nothing to say."""
    names = [*found.outputs, *(sweep.title for sweep in found.sweeps), *found.stores]
    made = (
        _summary(found),
        *map(_sweep, range(1, len(found.sweeps) + 1), found.sweeps),
        _pruned(found),
        _errors(found),
        _outliers(found),
        _masks(found),
        _scores(found),
        _ranks(found),
        _layers(found),
        _provenance(found),
        _warnings(found),
        Section(title="Not shown", text=found.facts.missing),
    )
    return Document(
        title=f"Pruning report: {', '.join(names)}",
        made_with=f"gradpipe {version('gradpipe')}",
        sections=tuple(section for section in made if not section.is_empty),
    )


def _summary(found: Found) -> Section:
    rows = [
        (
            name,
            _called(report),
            str(report.document.get("pattern", "")),
            report.requested,
            Zeros.sum(report.layers.values()).sparsity,
            _number(report.document.get("blocks_sparsity")),
            report.file_sparsity,
        )
        for name, report in found.outputs.items()
    ]
    columns = ("output", "method", "pattern", "asked for", "pruned layers", "blocks", "whole file")
    table = DataTable(
        name="outputs", caption="Share of zeros, by output", columns=columns, rows=tuple(rows)
    )
    return Section(title="Outputs", tables=(table,) if rows else ())


def _called(report: Recorded) -> str:
    """The method, and what becomes of the weights that it keeps."""
    return report.method + ("" if report.update == "none" else f" + {report.update}")


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _sweep(number: int, sweep: Sweep) -> Section:
    rows = tuple(_sweep_rows(sweep))
    columns = (
        "method",
        sweep.axis or "sparsity",
        "target",
        sweep.measure,
        "zeros of the blocks",
        "seconds",
    )
    table = DataTable(
        name=f"sweep-{number}", caption=f"Points of {sweep.title}", columns=columns, rows=rows
    )
    pictures = (figures.sweep(sweep, f"curves-{number}"),) if sweep.series else ()
    return Section(title=f"Sweep: {sweep.title}", pictures=pictures, tables=(table,))


def _sweep_rows(sweep: Sweep) -> Iterator[tuple[Cell, ...]]:
    names = names_of([x for x in sweep.results if x.point is not None], sweep.axis)
    for result in sweep.results:
        seconds = [x for x in result.seconds.values() if isinstance(x, int | float)]
        rest = (_number(result.zeros.get("blocks")), sum(map(float, seconds)))
        if result.point is None:
            x = 0.0 if sweep.axis == "sparsity" else None
            yield ("dense", x, "dense", result.metric.value, *rest)
            continue
        x = place_of(result, sweep.axis)
        if x is not None and sweep.axis in {"α", "samples"} and x.is_integer():
            x = int(x)
        yield (names[result.key], x, result.target, result.metric.value, *rest)


def _pruned(found: Found) -> Section:
    shares = {name: _shares(report) for name, report in found.outputs.items()}
    means = {name: _block_means(found.outputs[name]) for name in shares}
    lines = [
        figures.by_block("pruned-by-block", "Pruned share by block", "share of zeros", means),
    ]
    cells = [
        figures.by_layer(f"pruned-{i}", f"Pruned share by layer, {name}", "share of zeros", of)
        for i, (name, of) in enumerate(shares.items(), 1)
        if max(of.values()) - min(of.values()) > _ROUNDING
    ]
    return Section(title="Pruned share", pictures=tuple(lines + cells) if means else ())


def _shares(report: Recorded) -> dict[str, float]:
    return {name: layer.achieved for name, layer in report.layers.items()}


def _block_means(report: Recorded) -> dict[str, float]:
    """Of all weights of a block that were to be pruned."""
    blocks = summary([*report.layers.values()], by_kind=False)
    return {name: Zeros.sum(layers).sparsity for name, layers in blocks.items()}


def _errors(found: Found) -> Section:
    errors = {name: of for name, of in found.facts.errors.items() if of}
    limits = (0.0, max((x for of in errors.values() for x in of.values()), default=0.0))
    pictures = [
        figures.by_layer(f"error-{i}", f"Error of layers, {name}", "relative error", of, limits)
        for i, (name, of) in enumerate(errors.items(), 1)
    ]
    return _with_pictures("Where the error lies", _ERRORS, pictures)


def _outliers(found: Found) -> Section:
    outliers = found.facts.outliers
    layers = {x: share for x, share in outliers.items() if block_of(x) != x}
    blocks = {x: share for x, share in outliers.items() if block_of(x) == x}
    pictures = []
    if blocks:
        of_blocks = {"outlier ratio": blocks}
        pictures.append(
            figures.by_block("outliers-by-block", "Outlier ratio by block", "share", of_blocks)
        )
    if layers:
        pictures.append(figures.by_layer("outliers", "Outlier ratio by layer", "share", layers))
    return _with_pictures("Outliers", _OUTLIERS, pictures)


def _masks(found: Found) -> Section:
    layers = [layer for layer in found.facts.layers if layer.masks]
    is_figure_4 = any(len(x.masks) > len(found.outputs) for x in layers)
    pictures = [figures.masks(layer, f"masks-{i}") for i, layer in enumerate(layers, 1)]
    return _with_pictures("Masks", (_FIGURE_4 if is_figure_4 else "") + _MASKS, pictures)


def _scores(found: Found) -> Section:
    pairs = [(layer.name, fact) for layer in found.facts.layers for fact in layer.scores]
    pictures = [
        figures.scores(name, fact, f"scores-{i}") for i, (name, fact) in enumerate(pairs, 1)
    ]
    return _with_pictures("Scores and the cut", _SCORES, pictures)


def _ranks(found: Found) -> Section:
    pictures = [
        figures.by_layer(f"rank-{name}", f"Effective rank of {name}", "effective rank", of)
        for name, of in found.facts.ranks.items()
        if of
    ]
    return _with_pictures("Second moments", _RANKS, pictures)


def _with_pictures(title: str, text: str, pictures: Sequence[Picture]) -> Section:
    return Section(title=title, text=(text,) if pictures else (), pictures=tuple(pictures))


def _layers(found: Found) -> Section:
    """One row a layer, with all that is known of it."""
    facts = found.facts
    columns: dict[str, Mapping[str, Cell]] = {}
    for name, report in found.outputs.items():
        columns[f"zeros, {name}"] = _shares(report)
        columns[f"error, {name}"] = facts.errors.get(name, {})
    columns["outlier ratio"] = facts.outliers
    columns |= {f"rank, {statistic}": of for statistic, of in facts.ranks.items()}
    columns = {name: of for name, of in columns.items() if of}
    sizes = {name: x.size for report in found.outputs.values() for name, x in report.layers.items()}
    sizes |= {x.name: x.num_weights for store in found.stores.values() for x in store.spec.layers}
    if not sizes or not columns:
        return Section(title="Layers")
    if len(sizes) > _MANY:
        return Section(title="Layers", text=(f"{len(sizes):,} layers: see each pruning.json.",))
    rows = tuple(
        (name, size, *(of.get(name) for of in columns.values())) for name, size in sizes.items()
    )
    table = DataTable(
        name="layers", caption="Every layer", columns=("layer", "weights", *columns), rows=rows
    )
    return Section(title="Layers", tables=(table,))


def _provenance(found: Found) -> Section:
    rows = [(name, *pair) for name, x in found.outputs.items() for pair in _origin(x)]
    rows += [(name, *pair) for name, x in found.stores.items() for pair in _store_origin(x)]
    rows += [(x.title, *pair) for x in found.sweeps for pair in _sweep_origin(x)]
    commands = [str(x.document.get("command", "")) for x in found.outputs.values()]
    commands += [store.spec.command for store in found.stores.values()]
    table = DataTable(
        name="provenance",
        caption="What each was made of, and by which versions",
        columns=("of", "what", "value"),
        rows=tuple(rows),
    )
    return Section(title="Provenance", commands=tuple(filter(None, commands)), tables=(table,))


def _origin(report: Recorded) -> Iterator[tuple[str, str]]:
    for key in ("gradpipe", "model", "revision", "store", "score", "allocation", "group"):
        if (value := report.document.get(key)) is not None:
            yield key, str(value)


def _store_origin(store: GradientStore) -> Iterator[tuple[str, str]]:
    spec = store.spec
    samples = spec.samples
    yield "gradpipe", spec.gradpipe
    yield "model", f"{spec.model.name} ({spec.model.architecture}, {spec.model.dtype})"
    yield "digest", store.digest
    yield "statistics", ", ".join(spec.statistics)
    yield "samples", f"{samples.num_samples} x {samples.seq_len} tokens of {samples.dataset}"


def _sweep_origin(sweep: Sweep) -> Iterator[tuple[str, str]]:
    for what, values in (
        ("model", (f"{x.model.name} {x.model.digest}" for x in sweep.results)),
        ("store", (f"{x.store.name} {x.store.digest}" for x in sweep.results)),
        ("versions", (_pairs(x.versions) for x in sweep.results)),
        ("measured on", map(_measured, sweep.results)),
    ):
        yield from ((what, value) for value in dict.fromkeys(values) if value)


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _measured(result: PointResult) -> str:
    tokens, images = result.metric.tokens, result.metric.images
    much = f"{tokens:,} tokens" if tokens else f"{images:,} images" if images else ""
    options = [(f, x) for f, x in (result.measure or {}).items() if f.startswith("--")]
    return " ".join([much, *(word for option in options for word in words(*option))]).strip()


def _warnings(found: Found) -> Section:
    lines: list[str] = []
    for name, report in found.outputs.items():
        lines += [f"{name}: {note}" for note in _texts(report.document.get("notes"))]
        mismatched = _texts(report.document.get("mismatched_layers"))
        for layers, what in (
            (mismatched, "were pruned though they are not those that were measured"),
            (
                sorted(report.unseen),
                "were reached by no calibration token, and pruned by magnitude",
            ),
        ):
            if layers:
                more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
                lines.append(f"{name}: {layers[0]}{more} {what}")
    return Section(title="Warnings", text=tuple(lines))


def _texts(values: object) -> list[str]:
    return [str(value) for value in values] if isinstance(values, list) else []
