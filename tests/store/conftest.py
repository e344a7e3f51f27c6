"""A finished store to be tampered with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gradpipe.store.folder import Calibration
from gradpipe.store.objects import CommitRecord, digest
from gradpipe.store.schema import FORMAT_VERSION, LayerSpec, ModelSpec, SampleSpec, StoreSpec
from gradpipe.store.statistics import LayerStats
from gradpipe.store.writer import StoreWriter
from tests.store.corpus import INPUT_IDS, NAME, SHAPE, Objects


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one weight, and a finished store of it."""
    folder = tmp_path_factory.mktemp("hostile")
    generator = np.random.default_rng(0)
    weight = generator.normal(size=SHAPE).astype(np.float32)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"architectures": ["Toy"]}')
    save_file({f"{NAME}.weight": weight}, folder / "model" / "model.safetensors")
    layer = LayerSpec(
        name=NAME,
        weight_key=f"{NAME}.weight",
        shape=SHAPE,
        block=0,
        transposed=False,
        digest=digest(weight.tobytes()),
    )
    spec = StoreSpec(
        version=FORMAT_VERSION,
        gradpipe="0.1.0",
        objective="causal-lm",
        model=ModelSpec(
            name="toy", revision=None, architecture="Toy", dtype="float32", config_digest="1" * 32
        ),
        samples=SampleSpec(
            dataset="text",
            revision=None,
            sampling="document",
            seed=0,
            num_samples=2,
            seq_len=3,
            digest=digest(INPUT_IDS.tobytes()),
        ),
        statistics=("grad_l1", "grad_l2", "act_l2"),
        encoding="compact",
        layers=(layer,),
        command="pipe collect-grads toy STORE",
    )
    sums = np.exp(generator.normal(-9, 2, SHAPE)).astype(np.float32)
    arrays = {"grad_l1": sums, "grad_l2": sums**2, "act_l2": np.ones(SHAPE[1], dtype=np.float32)}
    writer = StoreWriter(folder / "store", spec)
    writer.begin(
        Calibration(arrays={"input_ids": INPUT_IDS, "sources": np.zeros((2, 2), np.int64)})
    )
    writer.write_layer(layer, LayerStats(arrays=arrays, num_samples=2, num_tokens=6))
    writer.commit()
    return folder


@pytest.fixture(scope="module")
def objects(folder: Path) -> Objects:
    """Every object of the store but its commit record."""
    store = folder / "store"
    record = CommitRecord.from_bytes((store / "commit.json").read_bytes())
    return {key: (store / key).read_bytes() for key in record.objects}
