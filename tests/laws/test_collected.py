"""Collected statistics: those of plain autograd, in any batch, encoding and dtype."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gradpipe import GradientStore, collect, open_store
from gradpipe.stages.prune.decode import decode_norms
from gradpipe.store.schema import LayerSpec
from tests.support.cases import (
    CASES,
    EVERY,
    EXPERTS,
    MECHANISMS,
    MOMENTS,
    NUM_SAMPLES,
    SEQ_LEN,
    TOKENS,
    VIT,
    Case,
    Shelf,
    files_of,
)
from tests.support.vision import NUM_TOKENS

EXPERTS_A_TOKEN = 2
Norms = npt.NDArray[np.float32]


def norms_of(store: GradientStore) -> Iterator[tuple[LayerSpec, str, Norms]]:
    """Every layer's every statistic."""
    for layer in store.spec.layers:
        for statistic in store.spec.statistics:
            yield layer, statistic, store.read_norms(layer, statistic)


def assert_close(got: Norms, expected: Norms, rtol: float = 1e-5) -> None:
    """Relative to each value, with a floor of `rtol` of the array's root mean square."""
    rms = float(np.sqrt(np.square(expected.astype(np.float64)).mean()))
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * rms)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_statistics_equal_plain_autograd(case: Case, shelf: Shelf) -> None:
    """Every statistic of every layer, and nothing but those layers, within 1e-5."""
    store, oracle = shelf.store(case), shelf.oracle(case)
    assert {layer.name for layer in store.spec.layers} == set(oracle)
    for layer, statistic, norms in norms_of(store):
        expected = oracle[layer.name][statistic]
        if statistic in MOMENTS:
            expected = expected[*torch.triu_indices(*expected.shape)]
        if statistic in {"grad_l2", "act_l2"}:
            expected = expected.sqrt()
        assert_close(norms, expected.numpy())
        assert statistic != "grad_l1" or (norms > 0).mean() > 0.8  # or zeros would pass for it


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_sample_and_token_is_counted(case: Case, shelf: Shelf) -> None:
    """Once for each layer; the experts of a block share each token by as many as it goes to."""
    store = shelf.store(case)
    length = NUM_TOKENS[case.family] if case.is_images else SEQ_LEN
    assert store.spec.samples.seq_len == length
    routed: dict[tuple[int | None, str], list[int]] = {}
    for layer in store.spec.layers:
        spec = store.read(layer, ["grad_l1"])["grad_l1"].spec
        assert spec.num_samples == NUM_SAMPLES
        if ".experts." in layer.name:
            matrix = layer.name.rsplit(".", 1)[-1]
            routed.setdefault((layer.block, matrix), []).append(spec.num_tokens)
        else:
            assert spec.num_tokens == NUM_SAMPLES * length
    assert bool(routed) == (case in EXPERTS)
    for counts in routed.values():
        assert len(counts) == 4
        assert sum(counts) == NUM_SAMPLES * length * EXPERTS_A_TOKEN
        assert len(set(counts)) > 1  # or the routing would not show


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers_with_one_input_keep_one_hessian(case: Case, shelf: Shelf) -> None:
    """q, k and v, or gate and up: the first of them has it on disk, and the others read that."""
    store = shelf.store(case)
    folder = shelf.root(case) / "store" / "layers"
    for block, distinct in enumerate(case.distinct_inputs):
        inside = [x for x in store.spec.layers if x.block == block]
        owners = [x.name for x in inside if x.own(("hessian",))]
        assert len(owners) == distinct
        assert owners == [x.name for x in inside if (folder / x.name / "hessian").exists()]


@pytest.mark.parametrize("batch_size", [1, NUM_SAMPLES])
@pytest.mark.parametrize("case", MECHANISMS, ids=str)
def test_the_batch_size_does_not_matter(
    case: Case, shelf: Shelf, tmp_path: Path, batch_size: int
) -> None:
    """A sample counts alike alone, and among all the others."""
    run = case.collecting(
        shelf.root(case), tmp_path / "store", statistics=EVERY, batch_size=batch_size
    )
    store, other = shelf.store(case), collect(run)
    for layer, statistic, norms in norms_of(other):
        assert_close(norms, store.read_norms(layer, statistic), 2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", MECHANISMS, ids=str)
def test_sums_are_float32_whatever_the_model_computes_in(
    case: Case, shelf: Shelf, tmp_path: Path, dtype: str
) -> None:
    """16-bit models give finite float32 sums near the float32 model's."""
    exact, store = (
        shelf.store(case),
        collect(case.collecting(shelf.root(case), tmp_path / "store", dtype=dtype)),
    )
    for layer, statistic, norms in norms_of(store):
        assert store.read(layer, [statistic])[statistic].parts["values"].dtype == np.float32
        expected = np.square(exact.read_norms(layer, statistic)).sum()
        assert float(np.square(norms).sum() / expected) == pytest.approx(1, abs=0.35), layer.name


@pytest.mark.parametrize("case", MECHANISMS, ids=str)
def test_compact_statistics_are_within_their_bounds(
    case: Case, shelf: Shelf, tmp_path: Path
) -> None:
    """Norms by 2.3 %, zeros exactly; correlations of moments by 1.6e-5 of their rows' own sizes."""
    run = case.collecting(
        shelf.root(case), tmp_path / "store", statistics=EVERY, encoding="compact"
    )
    exact, compact = shelf.store(case), collect(run)
    for layer, statistic, norms in norms_of(exact):
        got = compact.read_norms(layer, statistic)
        if statistic in MOMENTS:
            stores = (exact.read(layer, [statistic]), compact.read(layer, [statistic]))
            true, near = (decode_norms(x, statistic, torch.device("cpu")) for x in stores)
            roots = true.diagonal().sqrt()
            assert bool(((near - true).abs() <= 1.6e-5 * roots * roots[:, None]).all())
            torch.testing.assert_close(near.diagonal(), true.diagonal(), rtol=1e-6, atol=0)
            assert torch.equal(near, near.T)
            assert np.array_equal(got, near[*torch.triu_indices(*near.shape)].numpy())
        elif statistic in {"grad_l1", "grad_l2"}:
            np.testing.assert_allclose(got, norms, rtol=2.3e-2)
        else:
            assert_close(got, norms, 2e-3)


@pytest.mark.parametrize("case", MECHANISMS, ids=str)
def test_the_same_call_writes_the_same_store(case: Case, shelf: Shelf, tmp_path: Path) -> None:
    """To the byte, in any folder; called again it has nothing to do; it reads back as sound."""
    again = case.make(tmp_path / "elsewhere")
    run = case.collecting(again, statistics=EVERY)
    assert collect(run).digest == shelf.store(case).digest == collect(run).digest
    assert files_of(run.store) == files_of(shelf.root(case) / "store")
    open_store(run.store.as_uri()).validate()


def test_a_store_has_the_samples_that_it_was_given(shelf: Shelf) -> None:
    """Tokens as they are; each image once (what its pixels are is told with images)."""
    for case in MECHANISMS:
        arrays = shelf.store(case).calibration().arrays
        if case is VIT:
            assert len(set(arrays["sources"][:, 0].tolist())) == NUM_SAMPLES
        else:
            assert np.array_equal(arrays["input_ids"], TOKENS.numpy())
