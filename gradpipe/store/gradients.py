"""The gradient store: written by stage one, read layer by layer by stage two.

    zarr.json                                StoreSpec, and a consolidated copy of all metadata
    calibration/input_ids, …/sources         the samples: text, or
    calibration/pixel_values, …/labels       images
    layers/<layer>/<statistic>/<part>        plain Zarr arrays; StatisticSpec on the statistic
    partial/…                                while collecting: see `gradpipe.store.partial`
    commit.json                              written last: key, size, digest of every object

A store is complete when it has its commit record, and begun when it has the record of its
calibration samples, which every worker, resumption and shard then reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from gradpipe.errors import GradpipeError, InputError, StoreError, one_line
from gradpipe.store import arrays, codec
from gradpipe.store.lock import locked
from gradpipe.store.nodes import ATTRIBUTE, read_array, read_attributes, write_array, write_group
from gradpipe.store.objects import (
    COMMIT_KEY,
    CommitRecord,
    ObjectReader,
    ObjectWriter,
    digest,
    remove_strays,
)
from gradpipe.store.schema import LayerSpec, StatisticSpec, StoreSpec

LOCK_NAME = ".lock"
PARTIAL = "partial"
_BEGUN_KEY = f"{PARTIAL}/calibration.json"
_OWN = ("calibration", "layers", PARTIAL, COMMIT_KEY, "zarr.json")  # all that a store is made of


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStats:
    """Sums over samples for one layer."""

    arrays: dict[str, codec.Sums]  # statistic -> (out, in) or (in,)
    num_samples: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The samples of a store."""

    arrays: dict[str, npt.NDArray[Any]]  # as `SampleSpec.arrays` says

    @property
    def digest(self) -> str:
        """xxh3-128 of all that the model is given, in order."""
        given = [array.tobytes() for name, array in self.arrays.items() if name != "sources"]
        return digest(b"".join(given))


def is_complete(folder: Path) -> bool:
    """True if the folder has a store's commit record."""
    return (folder / COMMIT_KEY).is_file()


def is_begun(folder: Path) -> bool:
    """True if the folder holds an unfinished store whose samples are fixed."""
    return not is_complete(folder) and (folder / _BEGUN_KEY).is_file()


def is_free(folder: Path) -> bool:
    """True if the folder is free for a store: empty, or left by a run that was killed."""
    if not folder.exists() or is_begun(folder):
        return True
    if {path.name for path in folder.iterdir()} <= {LOCK_NAME, ".zarr.json.tmp"}:
        return True
    if is_complete(folder) or not (folder / "zarr.json").is_file():
        return False
    try:
        document = arrays.parse_group((folder / "zarr.json").read_bytes())
        return ATTRIBUTE in document.get("attributes", {})
    except (StoreError, TypeError):
        return False


def read_begun(folder: Path) -> tuple[StoreSpec, Calibration]:
    """Spec and samples of an unfinished store; StoreError if they are damaged."""
    try:
        document = arrays.parse_group((folder / "zarr.json").read_bytes())
        spec = StoreSpec.from_json(document["attributes"][ATTRIBUTE])
        return spec, _read_calibration(ObjectReader(str(folder), record_key=_BEGUN_KEY), spec)
    except (StoreError, FileNotFoundError, KeyError, TypeError) as error:
        raise StoreError(
            f"store {folder} was begun, but its samples or its zarr.json are damaged "
            f"({one_line(error)}): start anew with --overwrite"
        ) from error


def _read_calibration(objects: ObjectReader, spec: StoreSpec) -> Calibration:
    types = spec.samples.arrays()
    arrays = {name: read_array(objects, f"calibration/{name}", *types[name]) for name in types}
    calibration = Calibration(arrays=arrays)
    if calibration.digest != spec.samples.digest:
        names = ", ".join(name for name in types if name != "sources")
        raise StoreError(f"store {objects.url}: calibration/{names} are not the spec's samples")
    if "labels" in arrays and int(arrays["labels"].min()) < 0:
        raise StoreError(f"store {objects.url}: calibration/labels are negative")
    return calibration


class StoreWriter:
    """Writes a store into a local folder: samples and spec, then layers, then the commit record."""

    def __init__(self, folder: Path, spec: StoreSpec) -> None:
        """Nothing is written yet."""
        self.folder = folder
        self.spec = spec
        self._objects = ObjectWriter(folder)

    def begin(self, calibration: Calibration | None) -> None:
        """Write samples and spec; writing them again, to resume, gives the same bytes."""
        write_group(self._objects, "", self.spec.to_json())  # first: it says whose the folder is
        if calibration is not None:
            samples = ObjectWriter(self.folder)
            write_group(samples, "calibration", None)
            for name, array in calibration.arrays.items():
                write_array(samples, f"calibration/{name}", array)
            self.adopt(samples.record)
        write_group(self._objects, "layers", None)
        if calibration is not None:
            (self.folder / PARTIAL).mkdir(exist_ok=True)
            samples.commit(_BEGUN_KEY)

    def adopt(self, record: CommitRecord) -> None:
        """Count objects that were written and committed before as part of the store."""
        self._objects.record.objects.update(record.objects)

    def write_layer(self, layer: LayerSpec, stats: LayerStats) -> CommitRecord:
        """Encode and write every statistic of one layer; returns what was written."""
        counts = (stats.num_samples, stats.num_tokens)
        return self.write_encoded(
            layer, codec.encode_layer(self.spec.encoding, stats.arrays, *counts)
        )

    def write_encoded(self, layer: LayerSpec, encoded: dict[str, codec.Encoded]) -> CommitRecord:
        """Write statistics of one layer as they are; returns what was written."""
        objects = ObjectWriter(self.folder)
        write_group(objects, f"layers/{layer.name}", None)
        for statistic, item in encoded.items():
            key = f"layers/{layer.name}/{statistic}"
            write_group(objects, key, item.spec.to_json())
            for part, array in item.parts.items():
                write_array(objects, f"{key}/{part}", array)
        self.adopt(objects.record)
        return objects.record

    def commit(self) -> None:
        """Consolidate the metadata, declare the store complete, and tidy it.

        Raises GradpipeError if a layer's statistic was not written, or its record has vanished.
        """
        for layer in self.spec.layers:
            for statistic in layer.own(self.spec.statistics):
                if f"layers/{layer.name}/{statistic}/zarr.json" not in self._objects.record.objects:
                    raise GradpipeError(
                        f"store {self.folder}: {statistic} of {layer.name} has vanished: run the "
                        "same command again"
                    )
        keys = [key for key in self._objects.record.objects if key.endswith("zarr.json")]
        metadata = {key: (self.folder / key).read_bytes() for key in keys}
        self._objects.write("zarr.json", arrays.consolidate(metadata))
        self._objects.commit()
        tidy(self.folder)


def clear(folder: Path) -> None:
    """Remove the store in `folder`, whose lock the caller holds, to begin another in its place.

    Raises InputError if a process is still collecting one of its shards.
    """
    for lock in (folder / PARTIAL).glob("*.lock"):
        with locked(lock, of=folder, wait=False):
            pass  # nobody holds it, and nobody can take it without the store's lock
    for key in (COMMIT_KEY, _BEGUN_KEY):  # first: without the rest it is neither
        (folder / key).unlink(missing_ok=True)
    remove_strays(folder, _OWN, keep=())


def tidy(folder: Path) -> None:
    """Remove what a complete store's commit record does not name; files of others stay."""
    record = CommitRecord.from_bytes((folder / COMMIT_KEY).read_bytes())
    remove_strays(folder, (*_OWN, LOCK_NAME), keep={*record.objects, COMMIT_KEY})


class GradientStore:
    """A complete gradient store, read-only, local or remote; every byte is verified when read."""

    def __init__(self, objects: ObjectReader) -> None:
        """Use `GradientStore.open`."""
        self._objects = objects
        self.spec = StoreSpec.from_json(read_attributes(objects, ""))
        self.digest = objects.record_digest  # names the whole content

    @classmethod
    def open(cls, url: str | Path, options: dict[str, Any] | None = None) -> Self:
        """Open the store at a path or fsspec URL (`s3://…`, `hf://…`).

        Raises InputError if there is none, StoreError if it is incomplete or damaged.
        """
        return cls(ObjectReader(str(url), options))

    @property
    def url(self) -> str:
        """Where the store was opened."""
        return self._objects.url

    @property
    def local_folder(self) -> Path | None:
        """The folder that it lies in, None if it is remote."""
        return self._objects.local_folder

    def read(self, layer: LayerSpec, statistics: Iterable[str]) -> dict[str, codec.Encoded]:
        """Statistics of one layer as stored, with the bases that they are coded against.

        Raises InputError if the store lacks one, StoreError if it is damaged.
        """
        encoded: dict[str, codec.Encoded] = {}
        waiting = list(statistics)
        if missing := [name for name in waiting if name not in self.spec.statistics]:
            raise InputError(
                f"store {self.url} has no {missing[0]}, it has "
                f"{', '.join(self.spec.statistics)}: collect again with --statistics"
            )
        while waiting:
            statistic = waiting.pop()
            if statistic not in encoded:
                encoded[statistic] = item = self._read_statistic(layer, statistic)
                waiting.extend([item.spec.base] if item.spec.base else [])
        codec.check_bases(encoded)
        return encoded

    def read_norms(self, layer: LayerSpec, statistic: str) -> codec.Sums:
        """One statistic of a layer as float32 norms: Σ|G|, √ΣG², ΣG, (out, in); √Σx², Σx, (in,).

        Second moments are packed triangles. Raises as `read` does.
        """
        return codec.decode_layer(self.read(layer, [statistic]))[statistic]

    def calibration(self) -> Calibration:
        """The calibration samples; InputError if the store was imported."""
        if not self.spec.samples.digest:
            raise InputError(f"store {self.url} was imported: it does not have its samples")
        return _read_calibration(self._objects, self.spec)

    def input_ids(self) -> npt.NDArray[np.int32]:
        """The calibration tokens, (samples, tokens); InputError if the store has none."""
        if self.spec.samples.image_shape is not None:
            raise InputError(f"store {self.url} holds images: it has no tokens")
        return self.calibration().arrays["input_ids"]

    def is_unseen(self, layer: LayerSpec) -> bool:
        """True if no calibration token reached this layer: an expert that was never chosen."""
        if not self.spec.samples.digest:
            return False  # imported: its tokens were not counted
        statistic = self.spec.statistics[0]
        return self._statistic_spec(_key(layer, statistic)).num_tokens == 0

    def verify(self) -> None:
        """Read every object; raise StoreError naming the first that is not as it was written."""
        for key in self._objects.record.objects:
            self._objects.verify(key)

    def validate(self) -> None:
        """Verify, then decode everything; StoreError names the first that is not as it must be."""
        self.verify()
        for layer in self.spec.layers:
            encoded = self.read(layer, layer.own(self.spec.statistics))
            for statistic, item in encoded.items():
                if not codec.is_sound(statistic, item):
                    raise StoreError(
                        f"store {self.url}: {statistic} of {layer.name} is not finite, or negative"
                    )
        if self.spec.samples.digest:
            self.calibration()

    def sizes(self) -> dict[str, int]:
        """Bytes on disk of each statistic, over all layers; everything else under `other`."""
        sizes = dict.fromkeys((*self.spec.statistics, "other"), 0)
        for key, (size, _) in self._objects.record.objects.items():
            steps = key.split("/")
            statistic = steps[2] if steps[0] == "layers" and len(steps) > 3 else "other"
            sizes[statistic if statistic in sizes else "other"] += size
        return sizes

    def _read_statistic(self, layer: LayerSpec, statistic: str) -> codec.Encoded:
        key = _key(layer, statistic)
        spec = self._statistic_spec(key)
        types = codec.part_types(spec, layer, statistic)
        parts = {name: read_array(self._objects, f"{key}/{name}", *types[name]) for name in types}
        return codec.Encoded(spec=spec, parts=parts)

    def _statistic_spec(self, key: str) -> StatisticSpec:
        return StatisticSpec.from_json(read_attributes(self._objects, key))


def open_store(url: str | Path, options: dict[str, Any] | None = None) -> GradientStore:
    """As `GradientStore.open`."""
    return GradientStore.open(url, options)


def _key(layer: LayerSpec, statistic: str) -> str:
    return f"layers/{layer.keeper(statistic)}/{statistic}"
