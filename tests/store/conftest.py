"""A finished store to be tampered with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gradpipe.store.objects import CommitRecord, digest
from tests.store.corpus import NAME, SHAPE, Objects
from tests.support.stores import toy_layer, toy_spec, write_toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one weight, and a finished store of it."""
    folder = tmp_path_factory.mktemp("hostile")
    generator = np.random.default_rng(0)
    weight = generator.normal(size=SHAPE).astype(np.float32)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"architectures": ["Toy"]}')
    save_file({f"{NAME}.weight": weight}, folder / "model" / "model.safetensors")
    layer = toy_layer(NAME, SHAPE, digest=digest(weight.tobytes()))
    spec = toy_spec([layer], ("grad_l1", "grad_l2", "act_l2"))
    sums = np.exp(generator.normal(-9, 2, SHAPE)).astype(np.float32)
    arrays = {"grad_l1": sums, "grad_l2": sums**2, "act_l2": np.ones(SHAPE[1], dtype=np.float32)}
    write_toy(folder / "store", spec, {NAME: arrays})
    return folder


@pytest.fixture(scope="module")
def objects(folder: Path) -> Objects:
    """Every object of the store but its commit record."""
    store = folder / "store"
    record = CommitRecord.from_bytes((store / "commit.json").read_bytes())
    return {key: (store / key).read_bytes() for key in record.objects}
