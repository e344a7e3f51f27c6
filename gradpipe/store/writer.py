"""Write a store: samples and spec first, then layers, then the commit record."""

from pathlib import Path

from gradpipe.errors import GradpipeError
from gradpipe.store import arrays, codec
from gradpipe.store.arrays import write_array, write_group
from gradpipe.store.folder import BEGUN_KEY, PARTIAL, Calibration, tidy
from gradpipe.store.objects import CommitRecord, ObjectWriter
from gradpipe.store.schema import LayerSpec, StoreSpec
from gradpipe.store.statistics import LayerStats


class StoreWriter:
    """Writes a store into a local folder: samples and spec, then layers, then the commit record."""

    def __init__(self, folder: Path, spec: StoreSpec) -> None:
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
            samples.commit(BEGUN_KEY)

    def adopt(self, record: CommitRecord) -> None:
        """Count objects that were written and committed before as part of the store."""
        self._objects.record.add(record)

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
