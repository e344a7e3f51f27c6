"""What a report measures of weights and statistics, a layer at a time, and what it cannot."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from gradpipe.errors import InputError, did_you_mean
from gradpipe.pipeline.progress import counted, progress_bar
from gradpipe.pipeline.report_config import ReportConfig
from gradpipe.pipeline.reports.facts import Facts, LayerFacts, MaskFact, ScoreFact
from gradpipe.pipeline.reports.kinds import block_of
from gradpipe.pipeline.reports.recorded import Recorded
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.checkpoint.layer_names import find_layer
from gradpipe.stages.checkpoint.place import EMBEDDED_NAME
from gradpipe.stages.checkpoint.tensors import FLOAT_TYPES, as_tensor, matrix_shape
from gradpipe.stages.device import memory_errors, resolve_device
from gradpipe.stages.prune.allocation_rules import OWL_OUTLIERS
from gradpipe.stages.prune.decode import decode_norms
from gradpipe.stages.prune.mask import budget_mask
from gradpipe.stages.prune.measures import cuts, histogram, relative_error, shrunk
from gradpipe.stages.prune.methods import GRAD_NORMS, METHODS, Score, find_score
from gradpipe.stages.prune.score import LayerStatistics, score_layer
from gradpipe.stages.prune.score_passes import ScorePasses
from gradpipe.stages.prune.target import Budget, Group, Pattern, exact_sparsity
from gradpipe.store.objects import digest
from gradpipe.store.reader import GradientStore
from gradpipe.store.schema import LayerSpec
from gradpipe.store.summary import effective_rank

_CELLS = 256  # of a picture of a mask, along each side
_KEYS = re.compile(r"(^|[._])(k_proj|key|k|wk|query_key_value|qkv|qkv_proj|c_attn)($|[._])")
_HALF = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sources:
    """What there is to read: the dense model and a store of it, outputs, and where to compute."""

    dense: Checkpoint | None
    store: GradientStore | None
    outputs: Mapping[str, Checkpoint]
    device: torch.device

    def weight(self, checkpoint: Checkpoint, layer: LayerSpec) -> Tensor:
        """A layer's weights, (O, I); InputError if they are not the store's layer's."""
        if layer.weight_key not in checkpoint.tensors:
            raise InputError(f"{checkpoint.name} has no {layer.weight_key}: it is another model's")
        place = checkpoint.place(layer)
        shape = matrix_shape(place, transposed=layer.transposed)
        if shape != layer.shape or place.dtype not in FLOAT_TYPES:
            raise InputError(
                f"{checkpoint.name}: layer {layer.name} is {place.dtype} {shape}, in the store "
                f"{layer.shape}: it is another model's"
            )
        data = checkpoint.read_place(place)
        if checkpoint is self.dense and layer.digest not in ("", digest(data)):
            raise InputError(
                f"--model {checkpoint.name}: layer {layer.name} is not what the store was "
                "collected from: give that model, or leave the store out"
            )
        weight = as_tensor(data, place).to(self.device)
        return weight.T if layer.transposed else weight

    def score(self, layer: LayerSpec, score: Score) -> Tensor:
        assert self.dense is not None
        assert self.store is not None
        encoded = self.store.read(layer, score.statistics)
        statistics = LayerStatistics.decode(encoded, score.statistics, self.device)
        return score_layer(layer.name, self.weight(self.dense, layer), statistics, score)

    @property
    def specs(self) -> dict[str, LayerSpec]:
        return {} if self.store is None else {x.name: x for x in self.store.spec.layers}

    def lacking(self, names: Iterable[str]) -> list[str]:
        return [x for x in names if self.store is None or x not in self.store.spec.statistics]


def measure(
    config: ReportConfig,
    outputs: Mapping[str, Recorded],
    stores: Mapping[str, GradientStore],
    console: Console,
) -> Facts:
    """All that the inputs allow; InputError for a `--layer` that none of them has."""
    if not outputs and not stores:
        return Facts()
    model = config.model or _embedded(outputs, stores)
    sources = _Sources(
        dense=None if model is None else Checkpoint.open(model),
        store=next(iter(stores.values()), None),
        outputs={name: Checkpoint.open(name) for name in outputs},
        device=resolve_device(config.device),
    )
    with torch.inference_mode(), memory_errors("another --device"):
        return Facts(
            layers=tuple(_layers(config, sources, outputs)),
            outliers=_outliers(sources, console),
            errors={name: _errors(sources, name, outputs[name], console) for name in outputs},
            ranks=_ranks(sources, console),
            missing=tuple(_missing(sources, outputs, num_stores=len(stores))),
        )


def _embedded(outputs: Mapping[str, Recorded], stores: Mapping[str, GradientStore]) -> str | None:
    """The embedded model, where that is what all is of: no other is at hand for certain."""
    names = {str(report.document.get("model")) for report in outputs.values()}
    names |= {store.spec.model.name for store in stores.values()}
    return EMBEDDED_NAME if names == {EMBEDDED_NAME} else None


def _missing(sources: _Sources, outputs: Mapping[str, Recorded], num_stores: int) -> Iterator[str]:
    if sources.store is None:
        yield "Scores, outliers, errors and ranks: give the store beside the outputs."
        return
    if num_stores > 1:
        yield f"Of several stores, layers are measured by the first, {sources.store.url}."
    if sources.dense is None:
        yield "Scores, outliers and errors: they need the dense weights, --model."
    if lacking := sources.lacking(("grad_l1", "grad_sum")):
        yield f"The masks of Figure 4: collect {' and '.join(lacking)} too."
    if lacking := sources.lacking(("act_l2",)):
        yield f"Outliers: collect {lacking[0]} too."
    if outputs and sources.lacking(("hessian",)) and not sources.lacking(("act_l2",)):
        yield "Errors are estimates, by the inputs' norms: collect hessian too."


def _outliers(sources: _Sources, console: Console) -> dict[str, float]:
    """OWL's outlier ratio, of each layer and of each block."""
    specs = sources.specs
    if sources.dense is None or not specs or sources.lacking(("act_l2",)):
        return {}
    wanda = find_score("wanda", GRAD_NORMS[0], 0.0)
    inside = {name: block_of(name) for name, x in specs.items() if x.block is not None}
    with progress_bar(console, "outliers", 2 * (len(specs) + len(inside)), "layers") as advance:

        def compute(name: str) -> Tensor:
            advance(1)
            return sources.score(specs[name], wanda)

        passes = ScorePasses(specs, compute)
        own = {name: name for name in specs}
        layers = passes.outlier_shares(own, OWL_OUTLIERS)
        return layers | passes.outlier_shares(inside, OWL_OUTLIERS)


def _errors(sources: _Sources, output: str, report: Recorded, console: Console) -> dict[str, float]:
    """How far each pruned layer's output moves, relative to its size."""
    moment = next((x for x in ("hessian", "act_l2") if not sources.lacking((x,))), None)
    layers = [x for name, x in sources.specs.items() if name in report.layers]
    store = sources.store
    if sources.dense is None or store is None or moment is None:
        return {}
    pruned, found = sources.outputs[output], {}
    for layer in counted(layers, console, f"errors of {output}", len(layers), "layers"):
        found[layer.name] = relative_error(
            sources.weight(sources.dense, layer),
            sources.weight(pruned, layer),
            decode_norms(store.read(layer, [moment]), moment, sources.device),
        )
    return found


def _ranks(sources: _Sources, console: Console) -> dict[str, dict[str, float]]:
    """Of each second moment that the store has: layers with the same input have one hessian."""
    found: dict[str, dict[str, float]] = {}
    layers, store = list(sources.specs.values()), sources.store
    for statistic in ("hessian", "grad_cov"):
        if store is None or sources.lacking((statistic,)):
            continue
        of_keeper: dict[str, float] = {}
        for layer in counted(layers, console, f"ranks of {statistic}", len(layers), "layers"):
            keeper = layer.keeper(statistic)
            if keeper not in of_keeper:
                of_keeper[keeper] = effective_rank(store.read_norms(layer, statistic))
        found[statistic] = {layer.name: of_keeper[layer.keeper(statistic)] for layer in layers}
    return found


def _layers(
    config: ReportConfig, sources: _Sources, outputs: Mapping[str, Recorded]
) -> Iterator[LayerFacts]:
    names = list(dict.fromkeys([*sources.specs, *(x for r in outputs.values() for x in r.layers)]))
    for name in config.layer or _first_key(names):
        if name not in names:
            near = did_you_mean(name, names)
            raise InputError(f"--layer {name}: expected a layer's name, as {names[0]}{near}")
        spec = sources.specs.get(name)
        written = dict(_written(sources, outputs, name, spec))
        shape = next((tuple(x.shape) for x in written.values()), (0, 0))
        masks = [
            *_figure_4(sources, spec),
            *(MaskFact(title=x, kept=shrunk(k, _CELLS).numpy()) for x, k in written.items()),
        ]
        scores = [] if spec is None else [*_scores(sources, outputs, spec)]
        yield LayerFacts(
            name=name,
            shape=shape if spec is None else spec.shape,
            masks=tuple(masks),
            scores=tuple(scores),
        )


def _first_key(names: Sequence[str]) -> list[str]:
    """The first block's key projection, or what it is a part of; else the first layer."""
    return [name for name in names if _KEYS.search(name)][:1] or [*names[:1]]


def _figure_4(sources: _Sources, spec: LayerSpec | None) -> Iterator[MaskFact]:
    """By the gradient alone, half of the layer: summed with sign, and as ℓ1."""
    is_measured = sources.dense is not None and spec is not None
    if not is_measured or sources.lacking(("grad_sum", "grad_l1")):
        return
    assert spec is not None
    for norm, title in (("sum", "gradients with sign"), ("l1", "gradients, ℓ1")):
        score_OI = sources.score(spec, find_score("gradient", norm, 0.0))
        kept_OI = budget_mask(score_OI, Budget(exact_sparsity(_HALF)), Group(None))
        yield MaskFact(title=title, kept=shrunk(kept_OI, _CELLS).numpy())


def _written(
    sources: _Sources, outputs: Mapping[str, Recorded], name: str, spec: LayerSpec | None
) -> Iterator[tuple[str, Tensor]]:
    """What each output kept of a layer: its weights that are not zero; (O, I), if that is known."""
    for output, report in outputs.items():
        checkpoint, layer = sources.outputs[output], report.layers.get(name)
        place = None if layer is None else find_layer(checkpoint, name, layer.size)
        if place is not None:
            kept = as_tensor(checkpoint.read_place(place), place) != 0
            if kept.ndim == 2:
                yield output, kept.T if spec is not None and spec.transposed else kept


def _scores(
    sources: _Sources, outputs: Mapping[str, Recorded], spec: LayerSpec
) -> Iterator[ScoreFact]:
    """Each output's own score, or Wanda's for a method that has none."""
    if sources.dense is None:
        return
    for output, report in outputs.items():
        score = _own_score(report.document)
        if spec.name not in report.layers or sources.lacking(score.statistics):
            continue
        kept_OI = sources.weight(sources.outputs[output], spec) != 0
        score_OI = sources.score(spec, score)
        edges, kept, pruned = histogram(score_OI, kept_OI)
        yield ScoreFact(
            title=f"{output}, {score.expression.text}",
            edges=edges,
            kept=kept,
            pruned=pruned,
            num_zero=int((score_OI <= 0).sum()),
            cuts=_cuts(report, spec, score_OI),
        )


def _own_score(document: Mapping[str, Any]) -> Score:
    """What picked the weights, read from a record that anyone may have written."""
    formula = document.get("score")
    norm, alpha = document.get("grad_norm"), document.get("alpha")
    return find_score(
        formula if isinstance(formula, str) else str(METHODS["wanda"].formula),
        norm if isinstance(norm, str) and norm in GRAD_NORMS else GRAD_NORMS[0],
        float(alpha) if isinstance(alpha, int | float) else 0.0,
    )


def _cuts(report: Recorded, spec: LayerSpec, score_OI: Tensor) -> tuple[float, float, float] | None:
    """Thresholds of the groups, where a formula picked by groups that are known."""
    layer, group = report.layers[spec.name], str(report.document.get("group"))
    if report.document.get("score") is None or not layer.zeros:
        return None
    if layer.pattern is not None:
        pattern = Pattern.parse(layer.pattern)
        if score_OI.shape[1] % pattern.m:
            return None
        return cuts(score_OI.reshape(-1, pattern.m), float(pattern.sparsity), Group(0))
    return cuts(score_OI, layer.achieved, Group.parse("layer" if group == "global" else group))
