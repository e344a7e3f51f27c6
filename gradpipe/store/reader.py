"""The gradient store: written by stage one, read layer by layer by stage two.

    zarr.json                                StoreSpec, and a consolidated copy of all metadata
    calibration/input_ids, …/sources         the samples: text, or
    calibration/pixel_values, …/labels       images
    layers/<layer>/<statistic>/<part>        plain Zarr arrays; StatisticSpec on the statistic
    partial/…                                while collecting: see `gradpipe.store.snapshots`
    commit.json                              written last: key, size, digest of every object

A store is complete when it has its commit record, and begun when it has the record of its
calibration samples, which every worker, resumption and shard then reads.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from gradpipe.errors import InputError, StoreError
from gradpipe.store import codec
from gradpipe.store.arrays import Nodes, array_key, most_bytes
from gradpipe.store.facts import as_html, facts_of
from gradpipe.store.folder import Calibration, read_calibration
from gradpipe.store.nearby import ObjectCache
from gradpipe.store.objects import ObjectReader
from gradpipe.store.schema import LayerSpec, StatisticSpec, StoreSpec
from gradpipe.store.statistics import Sums

_LAYERS_AHEAD = 8  # of which the largest do not fit: they are bounded by bytes too


class GradientStore:
    """A complete gradient store, read-only, local or remote; every byte is verified when read."""

    def __init__(self, objects: ObjectReader) -> None:
        self.objects = objects  # what it is made of
        attributes, self._nodes = Nodes.of_root(objects)
        self.spec = StoreSpec.from_json(attributes)
        self.digest = objects.record_digest  # names the whole content
        self._followers: dict[str, Sequence[LayerSpec]] = {}  # by layer: those read after it

    @classmethod
    def open(
        cls,
        url: str | Path,
        options: dict[str, Any] | None = None,
        cache: Path | None = None,
    ) -> Self:
        """Open the store at a path or fsspec URL (`s3://…`, `hf://…`).

        What is read from far away is kept in the folder `cache`, and taken from there the next
        time. Raises InputError if there is no store, StoreError if it is incomplete or damaged.
        """
        kept = None if cache is None else ObjectCache(cache)
        return cls(ObjectReader(str(url), options, cache=kept))

    @property
    def url(self) -> str:
        """Where the store was opened."""
        return self.objects.url

    @property
    def local_folder(self) -> Path | None:
        """The folder that it lies in, None if it is remote."""
        return self.objects.local_folder

    def _repr_html_(self) -> str:
        return as_html(f"gradient store {self.url}", facts_of(self))

    @contextmanager
    def reading_ahead(self, order: Sequence[LayerSpec]) -> Iterator[None]:
        """While layers are read, fetch what is likely to be read next, several objects at once.

        `order` is that of the layers. Of a local folder, or in another order, nothing is lost.
        """
        self._followers = {
            layer.name: order[place + 1 : place + 1 + _LAYERS_AHEAD]
            for place, layer in enumerate(order)
        }
        with self.objects.reading_ahead():
            yield
        self._followers = {}

    def read(self, layer: LayerSpec, statistics: Iterable[str]) -> dict[str, codec.Encoded]:
        """Statistics of one layer as stored, with the bases that they are coded against.

        Raises InputError if the store lacks one, StoreError if it is damaged.
        """
        encoded: dict[str, codec.Encoded] = {}
        statistics = list(statistics)
        if missing := [name for name in statistics if name not in self.spec.statistics]:
            raise InputError(
                f"store {self.url} has no {missing[0]}, it has "
                f"{', '.join(self.spec.statistics)}: collect again, with that statistic"
            )
        followers = self._followers.get(layer.name, ())
        later = (key for x in followers for key in self._keys(x, statistics))
        self.objects.begin(self._keys(layer, statistics), later)
        waiting = list(statistics)
        while waiting:
            statistic = waiting.pop()
            if statistic not in encoded:
                encoded[statistic] = item = self._read_statistic(layer, statistic)
                waiting.extend([item.spec.base] if item.spec.base else [])
        codec.check_bases(encoded)
        return encoded

    def read_norms(self, layer: LayerSpec, statistic: str) -> Sums:
        """One statistic of a layer as float32 norms: Σ|G|, √ΣG², ΣG, (out, in); √Σx², Σx, (in,).

        Second moments are packed triangles. Raises as `read` does.
        """
        return codec.decode_layer(self.read(layer, [statistic]))[statistic]

    def calibration(self) -> Calibration:
        """The calibration samples; InputError if the store was imported."""
        if not self.spec.samples.digest:
            raise InputError(f"store {self.url} was imported: it does not have its samples")
        return read_calibration(self._nodes, self.spec)

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
        return self.counts(layer, statistic).num_tokens == 0

    def counts(self, layer: LayerSpec, statistic: str) -> StatisticSpec:
        """Over how many samples and tokens a layer's statistic was summed, and how it is kept."""
        return self._statistic_spec(_key(layer, statistic))

    def verify(self, each: Callable[..., Iterable[None]] = map) -> None:
        """Read every object; raise StoreError naming the first that is not as it was written.

        `each` may be a pool's `map`.
        """
        self._nodes.check_copies()
        keys = self.objects.record.objects
        for _ in each(self.objects.verify, [x for x in keys if not x.endswith("/zarr.json")]):
            pass  # metadata has just been read

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
        for key, (size, _) in self.objects.record.objects.items():
            steps = key.split("/")
            statistic = steps[2] if steps[0] == "layers" and len(steps) > 3 else "other"
            sizes[statistic if statistic in sizes else "other"] += size
        return sizes

    def _read_statistic(self, layer: LayerSpec, statistic: str) -> codec.Encoded:
        key = _key(layer, statistic)
        spec = self._statistic_spec(key)
        types = codec.part_types(spec, layer, statistic)
        parts = {name: self._nodes.array(f"{key}/{name}", *types[name]) for name in types}
        return codec.Encoded(spec=spec, parts=parts)

    def _keys(self, layer: LayerSpec, statistics: Iterable[str]) -> Iterator[str]:
        """The objects that hold a layer's statistics, and those that they are coded against.

        But for what is not as large as it must be: that is for whoever reads it to refuse.
        """
        specs = {x: self._statistic_spec(_key(layer, x)) for x in statistics}
        bases = {x.base for x in specs.values() if x.base is not None} - specs.keys()
        specs |= {x: self._statistic_spec(_key(layer, x)) for x in sorted(bases)}
        for statistic, spec in specs.items():
            for part, (shape, dtype) in codec.part_types(spec, layer, statistic).items():
                key = array_key(f"{_key(layer, statistic)}/{part}", shape)
                size, _ = self.objects.record.objects.get(key, (-1, ""))
                if 0 <= size <= most_bytes(shape, dtype):
                    yield key

    def _statistic_spec(self, key: str) -> StatisticSpec:
        return StatisticSpec.from_json(self._nodes.attributes(key))


def open_store(
    url: str | Path, options: dict[str, Any] | None = None, cache: Path | None = None
) -> GradientStore:
    """Open a finished store, to read what it holds.

    Args:
        url: A path, or a URL of fsspec: `s3://…`, `hf://…`.
        options: What fsspec's file system takes: an endpoint, say.
        cache: A folder where what is read from far away is kept for the next time.

    Returns:
        The store. Its arrays are read, and checked against their digests, when they are asked for.

    Raises:
        InputError: If there is no store.
        StoreError: If it is incomplete or damaged.

    Example:
        >>> from gradpipe import open_store
        >>> store = open_store("store")
        >>> layer = store.spec.layers[0]
        >>> store.read_norms(layer, "grad_l1").shape  # (out, in)
        (128, 128)

    """
    return GradientStore.open(url, options, cache)


def _key(layer: LayerSpec, statistic: str) -> str:
    return f"layers/{layer.keeper(statistic)}/{statistic}"
