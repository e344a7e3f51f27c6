"""The weights of stage two: a checkpoint's files, one weight at a time, to every target at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self, TypeVar

import torch
from torch import Tensor

from gradpipe.errors import GradpipeError, InputError, one_line
from gradpipe.pipeline.prune.plan import PruneJob
from gradpipe.stages.checkpoint.rewrite import rewrite
from gradpipe.stages.checkpoint.tensors import TensorInfo, as_tensor, tensor_bytes
from gradpipe.stages.device import memory_errors
from gradpipe.stages.prune.layer import norms_on, prune_layer, score_layer
from gradpipe.stages.prune.methods import Score
from gradpipe.store.codec import Encoded
from gradpipe.store.objects import digest
from gradpipe.store.schema import LayerSpec

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Written:
    """What was meant to be written, to hold the files against."""

    digests: dict[str, dict[str, str]] = field(default_factory=dict)  # label -> key -> xxh3
    mismatched: list[str] = field(default_factory=list)  # layers that are not the store's
    notes: list[str] = field(default_factory=list)  # messages for the user about layers

    def to_bytes(self) -> bytes:
        """For another process to read."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """What another process wrote."""
        return cls(**json.loads(data))

    def add(self, more: Written) -> None:
        """Add what was written of another file."""
        for label, digests in more.digests.items():
            self.digests.setdefault(label, {}).update(digests)
        self.mismatched.extend(more.mismatched)
        self.notes.extend(more.notes)


def write_file(job: PruneJob, file: str, staging: Path, advance: Callable[[int], None]) -> Written:
    """Write one safetensors file for every target; InputError if a weight was never measured."""
    written = Written()
    infos = (job.checkpoint.tensors[key] for key in job.layers)
    here = sorted((x for x in infos if x.file == file), key=lambda info: info.start)
    loads = [
        lambda info=info: _load(job, info, job.procedure_of(info.key).statistics) for info in here
    ]
    replaced = _pruned(job, _prefetched(loads), written, advance)
    outputs = [job.folder(staging, target) / file for target in job.targets]
    for output in outputs:
        output.parent.mkdir(parents=True, exist_ok=True)
    rewrite(job.checkpoint.folder / file, outputs, replaced)
    return written


@dataclass(frozen=True, slots=True)
class _Loaded:
    """One layer read from disk, ready for the device."""

    layer: LayerSpec
    info: TensorInfo
    weight: Tensor
    encoded: dict[str, Encoded]
    matches: bool  # the weight is the one that was measured


def _pruned(
    job: PruneJob, loaded: Iterable[_Loaded], written: Written, advance: Callable[[int], None]
) -> Iterator[tuple[TensorInfo, Iterable[Tensor]]]:
    for item in loaded:
        if not item.matches:
            _refuse_mismatch(job, item.layer)
            written.mismatched.append(item.layer.name)
        yield item.info, _each_target(job, item, written)
        advance(1)


def _each_target(job: PruneJob, item: _Loaded, written: Written) -> Iterator[Tensor]:
    """One layer's weights for each target in turn."""
    key, procedure = item.info.key, job.procedure_of(item.info.key)
    with _device_errors(item.layer.name):
        tensors = prune_layer(
            item.layer.name,
            item.weight.to(job.device),
            norms_on(item.encoded, procedure.statistics, job.device),
            procedure,
            [job.budget(target, key) for target in job.targets],
            written.notes,
            transposed=item.layer.transposed,
        )
        for target, tensor in zip(job.targets, tensors, strict=True):
            written.digests.setdefault(target.label, {})[key] = digest(tensor_bytes(tensor))
            yield tensor


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


def score_of(job: PruneJob, key: str, score: Score) -> Tensor:
    """One layer's scores, (O, I); GradpipeError if one is not a number."""
    item = _load(job, job.checkpoint.tensors[key], score.statistics)
    weight = item.weight.to(job.device)
    weight_OI = weight.T if item.layer.transposed else weight
    with _device_errors(item.layer.name):
        norms = norms_on(item.encoded, score.statistics, job.device)
        return score_layer(item.layer.name, weight_OI, norms, score)


def _load(job: PruneJob, info: TensorInfo, statistics: tuple[str, ...]) -> _Loaded:
    layer = job.layers[info.key]
    data = job.checkpoint.read_bytes(info.key)
    return _Loaded(
        layer=layer,
        info=info,
        weight=as_tensor(data, info),
        encoded=job.store.read(layer, statistics),
        matches=layer.digest in ("", digest(data)),
    )


def _refuse_mismatch(job: PruneJob, layer: LayerSpec) -> None:
    if not job.allow_mismatch:
        raise InputError(
            f"layer {layer.name}: its weights in {job.checkpoint.name} are not those that "
            f"the store {job.store.url} was collected from: collect again, or --allow-mismatch"
        )


def _prefetched(loads: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results in order, the next one being loaded while the caller works on this one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = None
        for load in loads:
            following = pool.submit(load)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()
