"""Stores that no model was collected for: specs of toys, and a writer of their sums."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradpipe.store.folder import Calibration
from gradpipe.store.objects import digest
from gradpipe.store.schema import FORMAT_VERSION, LayerSpec, ModelSpec, SampleSpec, StoreSpec
from gradpipe.store.statistics import LayerStats, Sums
from gradpipe.store.writer import StoreWriter

INPUT_IDS = np.arange(6, dtype=np.int32).reshape(2, 3)  # of two samples


def toy_layer(name: str, shape: tuple[int, int], **fields: Any) -> LayerSpec:
    """A layer of block 0."""
    values = {"weight_key": f"{name}.weight", "block": 0, "transposed": False, "digest": "0" * 32}
    return LayerSpec(name=name, shape=shape, **{**values, **fields})


def toy_spec(layers: Sequence[LayerSpec], statistics: tuple[str, ...], **fields: Any) -> StoreSpec:
    """A store of these layers."""
    values: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "gradpipe": "0.1.0",
        "objective": "causal-lm",
        "model": ModelSpec(
            name="toy", revision=None, architecture="Toy", dtype="float32", config_digest="1" * 32
        ),
        "samples": SampleSpec(
            dataset="text",
            revision=None,
            sampling="document",
            seed=0,
            num_samples=len(INPUT_IDS),
            seq_len=INPUT_IDS.shape[1],
            digest=digest(INPUT_IDS.tobytes()),
        ),
        "statistics": statistics,
        "encoding": "compact",
        "layers": tuple(layers),
        "command": "pipe collect-grads toy STORE",
    }
    return StoreSpec(**{**values, **fields})


def write_toy(folder: Path, spec: StoreSpec, sums: Mapping[str, Mapping[str, Sums]]) -> Path:
    """A finished store of these sums, by layer and statistic."""
    writer = StoreWriter(folder, spec)
    writer.begin(
        Calibration(arrays={"input_ids": INPUT_IDS, "sources": np.zeros((2, 2), np.int64)})
    )
    for layer in spec.layers:
        stats = LayerStats(arrays=sums[layer.name], num_samples=2, num_tokens=INPUT_IDS.size)
        writer.write_layer(layer, stats)
    writer.commit()
    return folder
