"""Evaluation of a model of the Hub: its commit is looked up once, and what is measured is that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gradpipe import DataConfig, EvalConfig, Metrics, evaluate
from gradpipe.pipeline.compare import compare
from tests.support import hub as hubs
from tests.support.models import save_tiny


def test_a_model_of_the_hub_is_opened_once(tmp_path: Path) -> None:
    """One look-up of what its newest commit is: a newer one cannot come in between."""
    model = save_tiny("llama", tmp_path / "model")
    np.save(tmp_path / "tokens.npy", np.arange(64) % 90)
    data = DataConfig(name=str(tmp_path / "tokens.npy"))
    config = EvalConfig(model="someone/tiny", data=data, seq_len=16)
    with hubs.serve() as hub:
        hub.commit("models/someone/tiny", model)
        with hubs.client(hub.endpoint, tmp_path / "cache") as client:
            [found] = client.submit(compare, [config.model], config).result()
        lookups = [x for x in hub.requests if x.startswith("GET /api/models/someone/tiny/revision")]
    assert len(lookups) == 1, hub.requests
    assert isinstance(found.metrics, Metrics)
    own = EvalConfig(model=str(model), data=data, seq_len=16)
    assert found.metrics.perplexity == pytest.approx(evaluate(own).perplexity, rel=1e-6)
