"""The compact encoding: exact where it says so, close elsewhere, small, and equal on any device."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradpipe import (
    CollectConfig,
    DataConfig,
    EvalConfig,
    GradientStore,
    PruneConfig,
    collect,
    evaluate,
    prune,
)
from gradpipe.errors import StoreError
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.prune.decode import decode_norms
from gradpipe.store import codec
from gradpipe.store.statistics import ENCODINGS, STATISTICS, Sums
from tests.support.stores import toy_layer

DATA = DataConfig(name="stdlib")
CPU = torch.device("cpu")
TINY = float(np.finfo(np.float32).tiny)

special = st.sampled_from([0.0, np.inf, TINY, 1e-30, 1e30])
matrices = st.tuples(
    st.integers(1, 12), st.integers(1, 13), st.integers(0, 2**31), st.lists(special, max_size=9)
)


def sums_of(case: tuple[int, int, int, list[float]]) -> dict[str, Sums]:
    """Gradient sums near rank one, with some special values strewn in."""
    rows, cols, seed, specials = case
    generator = np.random.default_rng(seed)
    scale = generator.normal(-12, 4, (rows, 1)) + generator.normal(0, 4, (1, cols))
    l1 = np.exp(scale + generator.normal(0, 1, (rows, cols))).astype(np.float32)
    for value in specials:
        l1[generator.integers(rows), generator.integers(cols)] = value
    with np.errstate(over="ignore"):
        l2 = (l1.astype(np.float64) ** 2 / 7).astype(np.float32)
    return {"grad_l1": l1, "grad_l2": l2, "grad_sum": l1 / 3, "act_l2": l2[0], "act_sum": -l1[0]}


@given(matrices)
def test_norms_come_back_within_their_step(case: tuple[int, int, int, list[float]]) -> None:
    """Zero and infinity are exact, every other norm is within 2.2 %, alone or against a base."""
    sums = sums_of(case)
    both = codec.decode_layer(codec.encode_layer("compact", sums, 3, 9))
    alone = codec.decode_layer(codec.encode_layer("compact", {"grad_l1": sums["grad_l1"]}, 3, 9))
    for statistic, got in (("grad_l1", both), ("grad_l2", both), ("grad_l1", alone)):
        norms = STATISTICS[statistic].norm_of(sums[statistic])
        zero, infinite = norms < TINY, np.isinf(norms)
        assert (got[statistic][zero] == 0).all()
        assert np.isinf(got[statistic][infinite]).all()
        ordinary = ~(zero | infinite)
        np.testing.assert_allclose(got[statistic][ordinary], norms[ordinary], rtol=2.2e-2)


@given(matrices, st.sampled_from(ENCODINGS))
def test_a_device_decodes_to_the_bits_of_numpy(
    case: tuple[int, int, int, list[float]], encoding: str
) -> None:
    """Gradient norms are the same float32 wherever they are decoded: so are the masks."""
    encoded = codec.encode_layer(encoding, sums_of(case), 3, 9)
    for statistic, norms in codec.decode_layer(encoded).items():
        got = decode_norms(encoded, statistic, CPU).numpy()
        np.testing.assert_allclose(got, norms, rtol=2e-7)
        if encoded[statistic].spec.encoding == "log":
            np.testing.assert_array_equal(got, norms)


@pytest.mark.parametrize("largest", [1e-44, 1e-40, TINY, 3e38])
def test_float16_holds_norms_of_any_size(largest: float) -> None:
    """A scale is a normal float32, however small the norms: they stay finite, and close."""
    sums = {"grad_l1": np.array([[largest, 0.0, largest / 3]], dtype=np.float32)}
    encoded = codec.encode_layer("float16", sums, 3, 9)
    assert encoded["grad_l1"].spec.scale >= TINY
    norms = codec.decode_layer(encoded)["grad_l1"]
    step = max(largest * 2**-11, TINY * 2**-25)  # half a step of float16, of its subnormals too
    np.testing.assert_allclose(norms, sums["grad_l1"], rtol=0, atol=step)


def test_a_scale_that_makes_norms_infinite_is_not_sound() -> None:
    """Values that are finite as they are stored, and not as they are read."""
    item = codec.encode_layer("float16", sums_of((4, 6, 1, [])), 3, 9)["grad_l1"]
    assert codec.is_sound("grad_l1", item)
    large = replace(item, spec=replace(item.spec, scale=2.0**120))
    assert not codec.is_sound("grad_l1", large)


def test_a_scale_is_a_power_of_two() -> None:
    """Any other rounds what it multiplies, and is nothing that the format writes."""
    spec = codec.encode_layer("float16", sums_of((4, 6, 1, [])), 3, 9)["grad_l1"].spec
    layer = toy_layer("up", (4, 6))
    assert codec.part_types(spec, layer, "grad_l1") == {"values": ((4, 6), "float16")}
    with pytest.raises(StoreError, match=r"a scale of 3\.0"):
        codec.part_types(replace(spec, scale=3.0), layer, "grad_l1")


def test_dead_rows_and_columns_stay_dead() -> None:
    """A neuron that no gradient reaches is zero, and costs its neighbours nothing."""
    sums = sums_of((8, 10, 0, []))
    sums["grad_l2"][3], sums["grad_l2"][:, 7] = 0, 0
    norms = codec.decode_layer(codec.encode_layer("compact", sums, 3, 9))["grad_l2"]
    assert (norms[3] == 0).all()
    assert (norms[:, 7] == 0).all()
    assert np.count_nonzero(norms) == 7 * 9


def test_codes_that_do_not_fit_their_escapes_are_refused() -> None:
    """A store that was tampered with is an error, not an index out of range."""
    encoded = codec.encode_layer("compact", sums_of((4, 6, 1, [])), 3, 9)
    encoded["grad_l2"].parts["codes"][0, 0] = 0xFF
    with pytest.raises(StoreError, match="escapes"):
        codec.decode_layer(encoded)
    with pytest.raises(StoreError, match="escapes"):
        decode_norms(encoded, "grad_l2", CPU)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, GradientStore]:
    """The embedded model's statistics over 128 samples, compact and exact."""
    root = tmp_path_factory.mktemp("stores")
    return {
        encoding: collect(
            CollectConfig(
                model="embedded",
                store=root / encoding,
                data=DATA,
                seq_len=256,
                batch_size=8,
                encoding=encoding,
            )
        )
        for encoding in ("compact", "float32")
    }


@pytest.mark.slow
def test_both_gradient_norms_take_under_a_byte_a_weight(stores: dict[str, GradientStore]) -> None:
    """0.85 bytes for the two, metadata included, where the reference's files take 4."""
    store = stores["compact"]
    weights = sum(layer.shape[0] * layer.shape[1] for layer in store.spec.layers)
    sizes = store.sizes()
    assert (sizes["grad_l1"] + sizes["grad_l2"]) / weights <= 0.85


@pytest.mark.slow
def test_pruning_from_a_compact_store_is_pruning_from_an_exact_one(
    stores: dict[str, GradientStore], tmp_path: Path
) -> None:
    """99.85 % of GBLM's (p = 2) mask is the same at 50 %, and the perplexity within 0.1 %."""
    zeros, perplexities = {}, {}
    for encoding, store in stores.items():
        out = tmp_path / encoding
        prune(PruneConfig(model="embedded", store=store.url, out=out, grad_norm="l2"))
        checkpoint = Checkpoint.open(str(out))
        zeros[encoding] = torch.cat(
            [checkpoint.read(layer.weight_key).flatten() == 0 for layer in store.spec.layers]
        )
        metrics = evaluate(
            EvalConfig(model=str(out), data=DATA, seq_len=256, batch_size=8, max_windows=128)
        )
        perplexities[encoding] = metrics.perplexity
    assert float((zeros["compact"] == zeros["float32"]).float().mean()) >= 0.9985
    assert perplexities["compact"] == pytest.approx(perplexities["float32"], rel=1e-3)


@pytest.mark.gpu
def test_cuda_decodes_to_the_same_bits() -> None:
    """Codes decoded on a GPU are the CPU's norms, and second moments, bit for bit."""
    encoded = codec.encode_layer("compact", sums_of((12, 13, 5, [0.0, np.inf])), 3, 9)
    values = np.random.default_rng(0).normal(3, 1, (200, 90)).astype(np.float32)
    packed = (values.T @ values)[np.triu_indices(90)]
    moments = codec.encode_layer("compact", {"hessian": packed}, 3, 9)
    whole = decode_norms(moments, "hessian", torch.device("cuda")).cpu().numpy()
    np.testing.assert_array_equal(
        whole[np.triu_indices(90)], codec.decode_layer(moments)["hessian"]
    )
    expected = codec.decode_layer(encoded)
    for statistic in ("grad_l1", "grad_l2"):
        got = decode_norms(encoded, statistic, torch.device("cuda"))
        np.testing.assert_array_equal(got.cpu().numpy(), expected[statistic])
