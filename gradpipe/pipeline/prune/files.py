"""The weights of stage two: a checkpoint's files, layer by layer, to every target at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import torch
from torch import Tensor

from gradpipe.errors import GradpipeError, InputError, one_line
from gradpipe.pipeline.prune.duty import Duty
from gradpipe.pipeline.prune.plan import AllocatedPlan, PrunePlan
from gradpipe.pipeline.prune.staging import make_folder
from gradpipe.pipeline.prune.workers import side_by_side
from gradpipe.stages.checkpoint.rewrite import rewriting
from gradpipe.stages.checkpoint.tensors import TensorInfo, as_tensor
from gradpipe.stages.device import memory_errors
from gradpipe.stages.prune.layer import SolvedLayer
from gradpipe.stages.prune.methods import Score
from gradpipe.stages.prune.score import LayerStatistics, score_layer
from gradpipe.store.codec import Encoded
from gradpipe.store.objects import digest

Taken = TypeVar("Taken")


@dataclass(frozen=True, slots=True)
class Written:
    """What was meant to be written, to hold the files against."""

    digests: dict[str, dict[str, str]] = field(default_factory=dict)  # label -> layer -> xxh3
    mismatched: list[str] = field(default_factory=list)  # layers that are not the store's
    notes: list[str] = field(default_factory=list)  # messages for the user about layers

    def to_bytes(self) -> bytes:
        """For another process to read."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """What another process wrote."""
        return cls(**json.loads(data))

    @classmethod
    def sum(cls, parts: Iterable[Written]) -> Self:
        """What was written of all parts."""
        written = cls()
        for part in parts:
            written.add(part)
        return written

    def add(self, more: Written) -> None:
        """Add what was written of another layer or file."""
        for label, digests in more.digests.items():
            self.digests.setdefault(label, {}).update(digests)
        self.mismatched.extend(more.mismatched)
        self.notes.extend(more.notes)


def write_file(
    allocated: AllocatedPlan,
    file: str,
    staging: Path,
    duty: Duty,
    advance: Callable[[int], None],
) -> Written:
    """Write this process's part of one safetensors file for every target.

    Raises InputError if a weight was never measured.
    """
    plan, written = allocated.plan, Written()
    names, copies_rest = duty.layers(plan.in_file(file)), duty.has_rest_of(file)
    if not names and not copies_rest:
        return written
    outputs = [plan.folder(staging, target) / file for target in plan.targets]
    for output in outputs:
        make_folder(output.parent, staging)
    places = [plan.places[name] for name in plan.in_file(file)]
    source = plan.checkpoint.folder / file
    with rewriting(source, outputs, places) as rewritten, side_by_side(plan.workers) as pool:
        results = pool.map(partial(prune_layer, allocated, take=rewritten.replace), names)
        if copies_rest:
            rewritten.copy_rest()
        for name, (digests, notes, matches) in zip(names, results, strict=True):
            of_targets = zip(plan.targets, digests, strict=True)
            own = {target.label: {name: found} for target, found in of_targets}
            written.add(Written(own, [] if matches else [name], [*notes]))
            advance(1)
    return written


def prune_layer(
    allocated: AllocatedPlan, name: str, take: Callable[[TensorInfo, Iterable[Tensor]], Taken]
) -> tuple[Taken, tuple[str, ...], bool]:
    """Give one layer's place and its weights for every target to `take`, one by one.

    Returns what `take` does, messages for the user, and whether the layer is the one that was
    measured. Raises InputError if it is not, and that was not allowed.
    """
    plan = allocated.plan
    chosen, budgets, measured = plan.chosen_for(name), allocated.of_layer(name), plan.layers[name]
    data, encoded = _read(plan, name, chosen.statistics)
    matches = measured.digest in ("", digest(data))
    if not (matches or plan.allow_mismatch):
        raise InputError(
            f"layer {name}: its weights in {plan.checkpoint.name} are not those that "
            f"the store {plan.store.url} was collected from: collect again, or --allow-mismatch"
        )
    with _device_errors(name):
        layer = SolvedLayer.of(
            name,
            as_tensor(data, plan.places[name]).to(plan.device),
            LayerStatistics.decode(encoded, chosen.statistics, plan.device),
            chosen,
            budgets,
            transposed=measured.transposed,
        )
        return take(plan.places[name], map(layer.to, budgets)), layer.notes, matches


def score_of(plan: PrunePlan, name: str, score: Score) -> Tensor:
    """One layer's scores, (O, I); GradpipeError if one is not a number."""
    data, encoded = _read(plan, name, score.statistics)
    with _device_errors(name):
        weight = as_tensor(data, plan.places[name]).to(plan.device)
        weight_OI = weight.T if plan.layers[name].transposed else weight
        statistics = LayerStatistics.decode(encoded, score.statistics, plan.device)
        return score_layer(name, weight_OI, statistics, score)


def _read(
    plan: PrunePlan, name: str, statistics: tuple[str, ...]
) -> tuple[memoryview, dict[str, Encoded]]:
    """The bytes of a layer's weight, and its statistics as the store has them."""
    data = plan.checkpoint.read_place(plan.places[name])
    return data, plan.store.read(plan.layers[name], statistics)


@contextmanager
def _device_errors(layer: str) -> Iterator[None]:
    """Say which layer it was that the device, or its solvers, could not do."""
    try:
        with memory_errors(f"layer {layer} is too large for the device: use another --device"):
            yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise GradpipeError(
            f"layer {layer}: its second moments cannot be decomposed: {one_line(error)}; use a "
            "method without them"
        ) from error
