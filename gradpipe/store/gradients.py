"""The gradient store: written once by stage one, read layer by layer by stage two.

zarr.json                                  StoreSpec, and a consolidated copy of all metadata
calibration/input_ids, calibration/sources
layers/<layer>/<statistic>/<part>          plain Zarr arrays; StatisticSpec on the statistic
commit.json                                written last: key, size and digest of every object
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from gradpipe.errors import StoreError
from gradpipe.store import arrays, codec
from gradpipe.store.objects import COMMIT_KEY, ObjectReader, ObjectWriter
from gradpipe.store.schema import LayerSpec, StatisticSpec, StoreSpec

_ATTRIBUTE = "gradpipe"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStats:
    """Sums over samples for one layer."""

    arrays: dict[str, codec.Sums]  # statistic -> (out, in) or (in,)
    num_samples: int
    num_tokens: int


def is_unfinished(folder: Path) -> bool:
    """True if `folder` is a gradient store that was begun and never committed."""
    root = folder / "zarr.json"
    if (folder / COMMIT_KEY).exists() or not root.is_file():
        return False
    try:
        return _ATTRIBUTE in arrays.parse_group(root.read_bytes()).get("attributes", {})
    except (StoreError, TypeError):
        return False


class StoreWriter:
    """Writes a store into a local folder: metadata and calibration, then layers, then commit."""

    def __init__(self, folder: Path, spec: StoreSpec) -> None:
        """Nothing is written yet."""
        self.spec = spec
        self._objects = ObjectWriter(folder)
        self._metadata: dict[str, bytes] = {}

    def begin(self) -> None:
        """Write the root group, which says what is to come."""
        self._write_group("zarr.json", self.spec.to_json())
        self._write_group("layers/zarr.json", None)

    def write_calibration(self, input_ids: npt.NDArray[np.int32], sources: Any) -> None:
        """Write the tokens (samples, tokens) and where each came from (samples, 2)."""
        self._write_group("calibration/zarr.json", None)
        self._write_array("calibration/input_ids", input_ids)
        self._write_array("calibration/sources", sources)

    def write_layer(self, layer: LayerSpec, stats: LayerStats) -> None:
        """Encode and write every statistic of one layer."""
        self._write_group(f"layers/{layer.name}/zarr.json", None)
        counts = (stats.num_samples, stats.num_tokens)
        for statistic, sums in stats.arrays.items():
            encoded = codec.encode(self.spec.encoding, statistic, sums, counts)
            self.write_encoded(layer, statistic, encoded)

    def write_encoded(self, layer: LayerSpec, statistic: str, encoded: codec.Encoded) -> None:
        """Write one statistic of one layer as it is."""
        key = f"layers/{layer.name}/{statistic}"
        self._write_group(f"{key}/zarr.json", encoded.spec.to_json())
        for part, array in encoded.parts.items():
            self._write_array(f"{key}/{part}", array)

    def commit(self) -> None:
        """Consolidate the metadata and declare the store complete."""
        self._objects.write("zarr.json", arrays.consolidate(self._metadata))
        self._objects.commit()

    def _write_group(self, key: str, attributes: dict[str, Any] | None) -> None:
        document = {} if attributes is None else {_ATTRIBUTE: attributes}
        self._metadata[key] = arrays.group_metadata(document)
        self._objects.write(key, self._metadata[key])

    def _write_array(self, key: str, array: npt.NDArray[Any]) -> None:
        for name, data in arrays.encode_array(array).items():
            self._objects.write(f"{key}/{name}", data)
            if name == "zarr.json":
                self._metadata[f"{key}/{name}"] = data


class GradientStore:
    """A complete gradient store, read-only, local or remote; every byte is verified when read."""

    def __init__(self, objects: ObjectReader) -> None:
        """Use `GradientStore.open`."""
        self._objects = objects
        attributes = self._attributes("zarr.json")
        self.spec = StoreSpec.from_json(attributes)
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

    def read(self, layer: LayerSpec, statistic: str) -> codec.Encoded:
        """One statistic of one layer, as stored; `codec.decode` makes sums of it."""
        key = f"layers/{layer.name}/{statistic}"
        spec = StatisticSpec.from_json(self._attributes(f"{key}/zarr.json"))
        if spec.encoding not in codec.ENCODINGS:
            raise StoreError(
                f"{key}: unknown encoding {spec.encoding[:40]!r}, expected {[*codec.ENCODINGS]}"
            )
        types = codec.part_types(spec, layer, statistic)
        parts = {name: self._array(f"{key}/{name}", *types[name]) for name in types}
        return codec.Encoded(spec=spec, parts=parts)

    def read_sums(self, layer: LayerSpec, statistic: str) -> codec.Sums:
        """One statistic of one layer as float32 sums, in numpy."""
        encoded = self.read(layer, statistic)
        sums = codec.decode(statistic, encoded.spec, encoded.parts, lambda a: a.astype(np.float32))
        return np.asarray(sums, dtype=np.float32)

    def input_ids(self) -> npt.NDArray[np.int32]:
        """The calibration tokens, (samples, tokens)."""
        samples = self.spec.samples
        shape = (samples.num_samples, samples.seq_len)
        return self._array("calibration/input_ids", shape, "int32")

    def validate(self) -> None:
        """Read everything; raise StoreError naming the first object that is not as it must be."""
        for key in self._objects.record.objects:
            self._objects.read(key)
        for layer in self.spec.layers:
            for statistic in self.spec.statistics:
                self.read(layer, statistic)
        if self.spec.samples.seq_len:
            self.input_ids()

    def sizes(self) -> dict[str, int]:
        """Bytes on disk of each statistic, over all layers; everything else under `other`."""
        sizes = dict.fromkeys((*self.spec.statistics, "other"), 0)
        for key, (size, _) in self._objects.record.objects.items():
            steps = key.split("/")
            statistic = steps[2] if steps[0] == "layers" and len(steps) > 3 else "other"
            sizes[statistic if statistic in sizes else "other"] += size
        return sizes

    def _attributes(self, key: str) -> object:
        try:
            document = arrays.parse_group(self._objects.read(key))
            return document["attributes"][_ATTRIBUTE]
        except (KeyError, TypeError) as error:
            raise StoreError(
                f"store {self.url}: {key} has no gradpipe attributes: it is damaged"
            ) from error

    def _array(self, key: str, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
        data_key = "/".join([key, "c", *("0" for _ in shape)])
        data = self._objects.read(data_key)
        try:
            return arrays.decode_array(self._objects.read(f"{key}/zarr.json"), data, shape, dtype)
        except StoreError as error:
            raise StoreError(f"store {self.url}: {key}: {error}") from error
