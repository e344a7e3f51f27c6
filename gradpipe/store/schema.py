"""What a gradient store says about itself: names, versions and the specs kept as Zarr attributes.

Both sides of the package meet here. A spec is a frozen dataclass, written as JSON by `to_json`
and read back by `from_json`, which trusts nothing: each field is checked before it is used.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from gradpipe.errors import StoreError
from gradpipe.store.statistics import STATISTICS, in_order

FORMAT_VERSION = 2  # what is written
_VERSIONS = (1, 2)  # what is read
CAUSAL_LM = "causal-lm"  # the mean cross-entropy of a sample's next tokens
IMAGE_CLASSIFICATION = "image-classification"  # the cross-entropy of a sample's label
OBJECTIVES = (CAUSAL_LM, IMAGE_CLASSIFICATION)
_DIGEST = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")


class JsonSpec:
    """Gives a frozen dataclass a JSON form, and a strict way back."""

    __slots__ = ()

    def to_json(self) -> dict[str, Any]:
        """Give the spec as plain JSON values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]

    @classmethod
    def from_json(cls, document: object) -> Self:
        """The spec in `document`; StoreError names the first field that is missing or mistyped."""
        if not isinstance(document, dict):
            raise StoreError(
                f"{cls.__name__}: expected a JSON object, got {type(document).__name__}"
            )
        hints = typing.get_type_hints(cls)
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        needed = {f.name for f in fields if f.default is dataclasses.MISSING}
        odd = (needed - set(document)) | (set(map(str, document)) - {f.name for f in fields})
        if odd:
            names = ", ".join(sorted(odd))
            raise StoreError(f"{cls.__name__}: missing or unknown fields: {names[:200]}")
        return cls(**{n: _parse(hints[n], document[n], f"{cls.__name__}.{n}") for n in document})


def _parse(hint: Any, value: object, where: str) -> Any:
    """`value` as an instance of the type `hint`, or StoreError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, list):
        return tuple(_parse(arguments[0], item, where) for item in value)
    if origin is types.UnionType:
        return None if value is None else _parse(arguments[0], value, where)
    if origin is Mapping and isinstance(value, dict):
        return value
    if isinstance(hint, type) and issubclass(hint, JsonSpec):
        return hint.from_json(value)
    if origin is None and type(value) is hint:
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise StoreError(f"{where}: expected {wanted}, got {type(value).__name__}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec(JsonSpec):
    """One prunable weight matrix: a tensor of the checkpoint, or one of its equal parts.

    The layer's name is its tensor's key in the checkpoint less `.weight`, and the part's number
    where it is one, so that stage two needs the checkpoint's files and nothing of the model's code.
    """

    name: str
    weight_key: str  # the tensor's key in the safetensors files
    shape: tuple[int, ...]  # (out, in), whatever the orientation on disk
    block: int | None  # index of the block it sits in; None outside the blocks (the head)
    transposed: bool  # True where the checkpoint keeps (in, out), as Conv1D does
    digest: str  # xxh3-128 of the layer's bytes in the checkpoint
    input_of: str | None = None  # the first layer of its block with the same input; None: itself
    part: tuple[int, ...] | None = None  # (index, count) of equal parts along the first dimension

    def __post_init__(self) -> None:
        """Refuse names that could leave the store's folder, and shapes that are not matrices."""
        if not _NAME.fullmatch(self.name) or len(self.name) > 255:
            raise StoreError(
                f"layer name {self.name[:80]!r} is not allowed: letters, digits, '_', '-' and '.'"
            )
        if self.part is not None and not (
            len(self.part) == 2 and 0 <= self.part[0] < self.part[1] < 2**31
        ):
            raise StoreError(f"layer {self.name}: impossible part {self.part!s:.80}")
        index = "" if self.part is None else f".{self.part[0]}"
        if self.weight_key.removesuffix(".weight") + index != self.name:
            raise StoreError(f"layer {self.name} is of another tensor: {self.weight_key[:80]!r}")
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise StoreError(f"layer {self.name}: expected a shape (out, in), got {self.shape}")

    def statistic_shape(self, statistic: str) -> tuple[int, ...]:
        """The shape that a statistic of this layer is stored in."""
        return STATISTICS[statistic].stored_shape(self.shape)

    @property
    def num_weights(self) -> int:
        """Out x in."""
        return math.prod(self.shape)

    def keeper(self, statistic: str) -> str:
        """Name of the layer that a statistic is kept under: this one, or its input's first."""
        return (self.input_of if STATISTICS[statistic].once_per_input else None) or self.name

    def own(self, statistics: Iterable[str]) -> tuple[str, ...]:
        """The statistics kept under this layer's name: not under its input's first."""
        return tuple(x for x in statistics if self.keeper(x) == self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class CouplingSpec(JsonSpec):
    """One layer's outputs are another's inputs, one to one, but for elementwise functions.

    Input i of `target` comes from the i-th of source's outputs that the runs list, in order. An
    output may come more than once: heads that share a value do.
    """

    source: str
    target: str
    outputs: tuple[tuple[int, ...], ...]  # runs (start, length) of source's outputs

    def check(self, layers: Mapping[str, LayerSpec]) -> None:
        """StoreError unless both layers are in `layers`, of shapes that the runs fit."""
        source, target = layers.get(self.source), layers.get(self.target)
        if source is None or target is None:
            raise StoreError(f"no layers {self.source[:80]!r} and {self.target[:80]!r} to couple")
        fit = all(
            len(run) == 2 and 0 <= run[0] < run[0] + run[1] <= source.shape[0]
            for run in self.outputs
        )
        if not fit or sum(run[1] for run in self.outputs) != target.shape[1]:
            raise StoreError(
                f"the {source.shape[0]} outputs of {source.name} cannot be the "
                f"{target.shape[1]} inputs of {target.name} by the runs {self.outputs!s:.80}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec(JsonSpec):
    """Which checkpoint was measured."""

    name: str  # a Hub id, or a local folder's own name
    revision: str | None  # the Hub's commit, None for a local folder
    architecture: str  # config.json's first architecture
    dtype: str  # what the model computed in: float32, bfloat16, float16
    config_digest: str  # xxh3-128 of config.json


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSpec(JsonSpec):
    """Which calibration samples were used."""

    dataset: str  # preset, Hub id, or a local file's own name
    revision: str | None  # the Hub's commit, None for local data
    sampling: str  # "document", "joined", both also "chat …"; "tokens", "images", "imported"
    seed: int
    num_samples: int
    seq_len: int  # tokens; of an image, those that the blocks see
    digest: str  # xxh3-128 of the int32 tokens, or of pixels, then labels; "" if not known
    image_shape: tuple[int, ...] | None = None  # (channels, height, width); None for text

    def __post_init__(self) -> None:
        counts_are_odd = not (0 < self.num_samples < 2**31 and 0 <= self.seq_len < 2**31)
        if counts_are_odd or (self.seq_len == 0) != (self.digest == ""):
            raise StoreError(
                f"impossible samples: {self.num_samples} of {self.seq_len} tokens, "
                f"digest {self.digest[:40]!r}"
            )
        shape = self.image_shape
        if shape is not None and not (
            len(shape) == 3 and all(0 < n < 2**16 for n in shape) and self.digest
        ):
            raise StoreError(f"impossible samples: images of shape {shape!s:.80}")

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of each array that the samples are kept in."""
        sources: tuple[tuple[int, ...], str] = ((self.num_samples, 2), "int64")
        if self.image_shape is None:
            return {
                "input_ids": ((self.num_samples, self.seq_len), "int32"),
                "sources": sources,
            }
        return {
            "pixel_values": ((self.num_samples, math.prod(self.image_shape)), "float32"),
            "labels": ((self.num_samples,), "int64"),
            "sources": sources,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSpec(JsonSpec):
    """All that a store says of itself, kept under `gradpipe` in the root group's attributes."""

    version: int
    gradpipe: str  # the version of the package that wrote it
    objective: str  # what was differentiated: one of `OBJECTIVES`
    model: ModelSpec
    samples: SampleSpec
    statistics: tuple[str, ...]
    encoding: str
    layers: tuple[LayerSpec, ...]
    command: str
    couplings: tuple[CouplingSpec, ...] = ()  # what is known of them; none in version 1

    @classmethod
    def from_json(cls, document: object) -> Self:
        """As `JsonSpec`, but first of all refuse versions that may have other fields."""
        version = document.get("version") if isinstance(document, dict) else FORMAT_VERSION
        if version not in _VERSIONS or type(version) is not int:
            raise StoreError(
                f"store version {version!s:.20}, this gradpipe reads "
                f"{' and '.join(map(str, _VERSIONS))}: upgrade it"
            )
        if isinstance(document, dict) and version == 1:
            document = _from_version_1(document)
        return super(StoreSpec, cls).from_json(document)

    def __post_init__(self) -> None:
        """Refuse unknown or repeated statistics and layers, and samples of another kind."""
        is_of_images = self.objective == IMAGE_CLASSIFICATION
        if self.samples.digest and is_of_images != (self.samples.image_shape is not None):
            raise StoreError(f"objective {self.objective:.40} does not go with the store's samples")
        if unknown := sorted(set(self.statistics) - set(STATISTICS)):
            raise StoreError(
                f"store holds {', '.join(unknown):.200}, which this program does not know: it "
                f"knows {', '.join(STATISTICS)}: run what added it, or upgrade gradpipe"
            )
        if not self.statistics or self.statistics != in_order(self.statistics):
            raise StoreError(
                f"store holds the statistics {self.statistics!s:.200}, expected some of "
                f"{', '.join(STATISTICS)}, in this order"
            )
        by_name = {layer.name: layer for layer in self.layers}
        if not self.layers or len(by_name) != len(self.layers):
            raise StoreError("store names no layers, or one twice")
        for layer in self.layers:
            if not _DIGEST.fullmatch(layer.digest):
                raise StoreError(f"layer {layer.name}: {layer.digest[:40]!r} is no digest")
            _check_input(layer, by_name)
        _check_parts(self.layers)
        for coupling in self.couplings:
            coupling.check(by_name)

    def layer(self, name: str) -> LayerSpec | None:
        """The layer of that name, None if the store has none."""
        return next((layer for layer in self.layers if layer.name == name), None)


def _from_version_1(document: dict[str, Any]) -> dict[str, Any]:
    """The same in the fields of version 2: `hessian_of` told of shared inputs, and nothing else."""
    layers = document.get("layers")
    if "couplings" in document or not isinstance(layers, list):
        raise StoreError("StoreSpec: missing or unknown fields: couplings, or layers")
    return {**document, "layers": [_layer_from_version_1(layer) for layer in layers]}


def _layer_from_version_1(layer: object) -> object:
    if not isinstance(layer, dict):
        return layer  # and it is refused as that
    if odd := sorted({"input_of", "part"} & set(layer)):
        raise StoreError(f"LayerSpec: missing or unknown fields: {', '.join(odd)}")
    return {("input_of" if name == "hessian_of" else name): x for name, x in layer.items()}


def _check_input(layer: LayerSpec, by_name: Mapping[str, LayerSpec]) -> None:
    """Refuse an input that is another's again, of another width, or of another block."""
    if layer.input_of is None:
        return
    first = by_name.get(layer.input_of)
    if first is None or first.input_of is not None or first.block != layer.block:
        raise StoreError(f"layer {layer.name} cannot share the input of {layer.input_of[:80]!r}")
    if first.shape[1] != layer.shape[1]:
        raise StoreError(
            f"layer {layer.name} of {layer.shape[1]} inputs cannot share the {first.shape[1]} of "
            f"{first.name}"
        )


def _check_parts(layers: Iterable[LayerSpec]) -> None:
    """Refuse layers of one tensor that are not parts of it, all of one size."""
    kinds: dict[str, tuple[object, ...]] = {}
    for layer in layers:
        kind = (layer.part and layer.part[1], layer.shape, layer.transposed)
        if kinds.setdefault(layer.weight_key, kind) != kind:
            raise StoreError(f"layers of {layer.weight_key[:80]!r} are not equal parts of it")


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticSpec(JsonSpec):
    """One statistic of one layer, kept under `gradpipe` in the statistic's group attributes."""

    encoding: str
    num_samples: int  # over how many samples it was summed
    num_tokens: int
    scale: float = 1.0  # float16: a power of two; norm = stored * scale
    num_escapes: int = 0  # log: how many escapes the codes hold
    base: str | None = None  # log: the statistic whose levels are added

    def __post_init__(self) -> None:
        counts = (self.num_samples - 1, self.num_tokens, self.num_escapes)
        if not all(0 <= count < 2**62 for count in counts) or not 0.0 < self.scale < 2.0**128:
            raise StoreError(f"statistic with impossible counts or scale: {self.to_json()!s:.200}")
