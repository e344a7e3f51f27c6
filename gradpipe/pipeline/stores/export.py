"""A store's statistics as a file that other tools read."""

import json
import math
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gradpipe.errors import GradpipeError, InputError
from gradpipe.pipeline.places import check_local, holds, is_writable
from gradpipe.pipeline.stores.config import IMATRIX, ExportConfig
from gradpipe.pipeline.stores.layers import chosen_layers
from gradpipe.store.codec import square
from gradpipe.store.objects import replacing
from gradpipe.store.reader import GradientStore
from gradpipe.store.schema import LayerSpec
from gradpipe.store.statistics import STATISTICS, Sums, in_order

Kept = list[tuple[LayerSpec, str]]  # each layer with each statistic that is kept under its name


def export(config: ExportConfig) -> Path:
    """Write the file, whole or not at all.

    Raises InputError if it is there, or the store lacks what the format holds; StoreError if the
    store is damaged.
    """
    store = GradientStore.open(config.store)
    _check_out(config.out, store)
    layers = chosen_layers(store, config.layer)
    if config.format == IMATRIX:
        from gradpipe.pipeline.stores.imatrix import Imatrix  # noqa: PLC0415 (of an extra)

        matrix = Imatrix.of(store, layers)
    else:
        statistics = _statistics(config, store)
        kept = _kept(store, layers, statistics)
    try:
        with replacing(config.out) as file:
            if config.format == IMATRIX:
                matrix.write(Path(file.name))
            else:
                _write_safetensors(file, store, kept)
    except OSError as error:
        raise GradpipeError(
            f"cannot write {config.out}: {error.strerror or error}: make room or give another "
            "folder"
        ) from error
    return config.out


def _check_out(out: Path, store: GradientStore) -> None:
    check_local("OUT", out)
    if out.exists() or out.is_symlink():
        raise InputError(f"OUT {out} exists: give another name")
    if not out.absolute().parent.is_dir() or not is_writable(out):
        raise InputError(f"OUT {out}: expected a file in a folder that exists and can be written")
    if store.local_folder is not None and holds(store.local_folder, out):
        raise InputError(f"OUT {out} is in the store: give another name")


def _statistics(config: ExportConfig, store: GradientStore) -> tuple[str, ...]:
    if missing := [x for x in config.statistics if x not in store.spec.statistics]:
        raise InputError(
            f"--statistics {missing[0]}: store {store.url} has "
            f"{', '.join(store.spec.statistics)}: choose among these"
        )
    return in_order(config.statistics) or store.spec.statistics


def _kept(store: GradientStore, layers: Iterable[LayerSpec], statistics: tuple[str, ...]) -> Kept:
    """What layers have: a second moment of several is that of the first, which may be no other."""
    named = {layer.name: layer for layer in store.spec.layers}
    pairs = ((named[layer.keeper(name)], name) for layer in layers for name in statistics)
    return list(dict.fromkeys(pairs))


def _write_safetensors(file: BinaryIO, store: GradientStore, kept: Kept) -> None:
    """Norms in float32, named `LAYER.STATISTIC`; second moments as whole matrices.

    The library writes what is in memory at once; these are written one by one, behind a header that
    is known before: github.com/huggingface/safetensors, "Format".
    """
    shapes = {f"{x.name}.{name}": STATISTICS[name].sum_shape(x.shape) for x, name in kept}
    header = _header(shapes, _metadata(store, kept))
    file.write(struct.pack("<Q", len(header)) + header)
    file.writelines(norms.astype("<f4").tobytes() for norms in _norms(store, kept))


def _norms(store: GradientStore, kept: Kept) -> Iterator[Sums]:
    with store.reading_ahead(list(dict.fromkeys(layer for layer, _ in kept))):
        for layer, name in kept:
            norms = store.read_norms(layer, name)
            yield square(norms) if STATISTICS[name].is_symmetric else norms


def _header(shapes: dict[str, tuple[int, ...]], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, shape in shapes.items():
        stop = start + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)


def _metadata(store: GradientStore, kept: Kept) -> dict[str, str]:
    """Of what, and over how much; values are texts, as the format has it."""
    tokens = {f"{x.name}.{name}": store.counts(x, name).num_tokens for x, name in kept}
    return {
        "digest": store.digest,
        "gradpipe": json.dumps(store.spec.to_json()),
        "num_tokens": json.dumps(tokens),
    }
