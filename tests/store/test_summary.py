"""What a store's statistics look like, against numpy on the whole arrays; two ways to read it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradpipe import GradientStore, InputError, StoreError
from gradpipe.pipeline.stores.config import StatsConfig
from gradpipe.pipeline.stores.stats import stats
from gradpipe.store.codec import square
from gradpipe.store.summary import OUTLIER_TIMES, QUANTILES, Spread, effective_rank
from gradpipe.store.writer import StoreWriter
from tests.support.workplace import run_pipe

STORE = Path(__file__).parents[1] / "data" / "store-v2"
WITHIN = 2 ** (1 / 32) + 1e-6  # half a level


@given(st.integers(0, 2**32 - 1), st.integers(1, 400), st.floats(0, 0.5))
def test_a_spread_is_that_of_the_array(seed: int, size: int, dead: float) -> None:
    """Quantiles are of the array to half a level, zeros and outliers are counted."""
    generator = np.random.default_rng(seed)
    norms = np.exp(generator.normal(-9, 3, size)).astype(np.float32)
    norms *= generator.choice([-1, 1], size) * (generator.random(size) >= dead)
    spread = Spread.of(norms)
    exact = np.quantile(np.abs(norms), QUANTILES, method="inverted_cdf")
    for got, expected in zip(spread.quantiles, exact, strict=True):
        assert expected / WITHIN <= got <= expected * WITHIN
    sizes = np.abs(norms).astype(np.float64)
    near = [(sizes > OUTLIER_TIMES * sizes.mean() * x).mean() for x in (WITHIN, 1 / WITHIN)]
    assert near[0] <= spread.outliers <= near[1]


def test_a_spread_of_parts_is_that_of_the_whole() -> None:
    """A block's spread needs its layers' alone."""
    norms = np.exp(np.random.default_rng(0).normal(-9, 3, 1000)).astype(np.float32)
    whole, parts = Spread.of(norms), Spread.sum(map(Spread.of, np.split(norms, [10, 400])))
    np.testing.assert_array_equal(whole.counts, parts.counts)
    assert whole.total == pytest.approx(parts.total)
    assert whole.outliers == parts.outliers


def test_infinities_are_counted_and_not_added() -> None:
    """A norm beyond float32's range is the largest, and no part of the mean."""
    spread = Spread.of(np.array([1, 1, np.inf, 0], dtype=np.float32))
    assert spread.quantiles == (0, 1, np.inf, np.inf)
    assert spread.outliers == 1 / 4


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12))
def test_effective_rank_is_the_eigenvalues(seed: int, width: int, samples: int) -> None:
    """(Σλ)² / Σλ², by eigenvalues."""
    rows = np.random.default_rng(seed).normal(size=(samples, width))
    moment = (rows.T @ rows).astype(np.float32)
    packed = moment[np.triu_indices(width)]
    values = np.linalg.eigvalsh(moment.astype(np.float64))
    assert effective_rank(packed) == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-4)
    np.testing.assert_array_equal(square(packed), np.triu(moment) + np.triu(moment, 1).T)


def test_effective_rank_of_the_largest_numbers() -> None:
    """Their sum is beyond a float32."""
    packed = np.array([3e38, 0, 0, 3e38, 0, 3e38], dtype=np.float32)
    assert effective_rank(packed) == pytest.approx(3)


def test_a_statistic_that_is_no_number_is_damage(tmp_path: Path) -> None:
    """The root of a negative sum of squares, in a store whose digests fit."""
    golden = GradientStore.open(STORE)
    layer = golden.spec.layers[0]
    item = golden.read(layer, ["act_l2"])["act_l2"]
    spec = replace(golden.spec, layers=(layer,), statistics=("act_l2",), couplings=())
    writer = StoreWriter(tmp_path / "store", spec)
    writer.begin(golden.calibration())
    parts = {"values": -np.ones_like(item.parts["values"])}
    writer.write_encoded(layer, {"act_l2": replace(item, parts=parts)})
    writer.commit()
    with pytest.raises(StoreError, match=f"act_l2 of {layer.name} holds what is no number"):
        stats(StatsConfig(store=str(tmp_path / "store")))


def test_a_layer_whose_one_statistic_another_keeps_was_seen(tmp_path: Path) -> None:
    """Its tokens are those of the layer that keeps the hessian of their input."""
    golden = GradientStore.open(STORE)
    assert any(layer.input_of for layer in golden.spec.layers)
    writer = StoreWriter(tmp_path / "store", replace(golden.spec, statistics=("hessian",)))
    writer.begin(golden.calibration())
    for layer in golden.spec.layers:
        writer.write_encoded(layer, golden.read(layer, layer.own(("hessian",))))
    writer.commit()
    found = stats(StatsConfig(store=str(tmp_path / "store")))
    for layer, described in zip(golden.spec.layers, found.layers, strict=True):
        tokens = golden.counts(layer, "act_l2").num_tokens
        assert (described.name, described.num_tokens) == (layer.name, tokens)
        assert described.unseen == int(tokens == 0)


def test_effective_rank_of_nothing_is_nothing() -> None:
    """An input that was always zero has no directions."""
    assert effective_rank(np.zeros(6, dtype=np.float32)) == 0


def test_blocks_count_inputs_once() -> None:
    """Layers that read the same input have the same dead ones."""
    found = stats(StatsConfig(store=str(STORE)))
    store = GradientStore.open(STORE)
    expected = {x.name: int((store.read_norms(x, "act_l2") == 0).sum()) for x in store.spec.layers}
    assert {x.name: x.dead_inputs for x in found.layers} == expected
    (block,) = found.blocks
    firsts = [x.name for x in store.spec.layers if x.input_of is None]
    assert block.dead_inputs == sum(expected[name] for name in firsts)
    assert block.num_layers == len(store.spec.layers)
    shared = {x.name for x in found.layers if "hessian" not in x.ranks}
    assert shared == {x.name for x in store.spec.layers if x.input_of is not None}


def test_the_command_shows_them_and_writes_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a table, and as JSON; a pattern chooses layers."""
    assert run_pipe(monkeypatch, "store", "stats", STORE, "--layer", "gate") == 0
    shown = capsys.readouterr().out
    assert "gate_proj" in shown.replace("\n", "")
    assert "block 0" in shown
    assert "experts" not in shown
    assert run_pipe(monkeypatch, "store", "stats", STORE, "--json", "-") == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["layers"]) == 5
    assert document["layers"][0]["norms"]["grad_l2"]["quantiles"][1] > 0


def test_a_pattern_that_finds_nothing_is_the_users_mistake() -> None:
    """The line names a layer that there is."""
    with pytest.raises(InputError, match="none of 5 layers, such as model"):
        stats(StatsConfig(store=str(STORE), layer="decoder"))
    with pytest.raises(InputError, match="regular expression"):
        StatsConfig(store=str(STORE), layer="(")
