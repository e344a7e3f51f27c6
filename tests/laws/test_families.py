"""Stage one and two against the naive reference, for every family of models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.collect.resident import resident_batch
from gradpipe.stages.collect.sums import LayerAccumulator
from gradpipe.stages.model.batch import Batch
from gradpipe.stages.model.experts import split_experts
from gradpipe.stages.model.load import load_model
from gradpipe.stages.model.skeleton import take_apart
from gradpipe.stages.prune.mask import pattern_mask, unstructured_mask
from gradpipe.stages.prune.methods import find_score
from gradpipe.stages.prune.score import LayerStatistics, score_weights
from gradpipe.stages.prune.target import Group, Pattern, exact_sparsity
from gradpipe.store.statistics import SECOND_MOMENTS, STATISTICS, LayerStats
from tests.support.models import FAMILIES, VOCAB_SIZE, random_ids, save_tiny, tiny_model
from tests.support.reference import (
    reference_mask,
    reference_nm_mask,
    reference_score,
    reference_statistics,
)

NUM_SAMPLES, SEQ_LEN = 5, 24
IDS = random_ids(VOCAB_SIZE, NUM_SAMPLES, SEQ_LEN, seed=1)


def collected(
    folder: Path,
    batch_size: int,
    dtype: str = "float32",
    statistics: tuple[str, ...] = tuple(STATISTICS),
) -> dict[str, LayerStats]:
    """Statistics of the model in `folder` by layer name, with the package's own hooks."""
    checkpoint = Checkpoint.open(str(folder))
    model = load_model(checkpoint, getattr(torch, dtype), torch.device("cpu"))
    skeleton = take_apart(checkpoint, getattr(torch, dtype))
    split_experts(model, skeleton.sources)
    layers = skeleton.layers
    sums = {x.path: LayerAccumulator(x.spec, statistics, torch.device("cpu")) for x in layers}
    for ids_BT in IDS.split(batch_size):
        resident_batch(model, sums, Batch.of_tokens(ids_BT))
    return {accumulator.spec.name: accumulator.result() for accumulator in sums.values()}


def norms_of(stats: LayerStats) -> LayerStatistics:
    """The norms that stage two would score with."""
    norms = {x: torch.from_numpy(STATISTICS[x].norm_of(s)) for x, s in stats.arrays.items()}
    return LayerStatistics(values=norms, num_samples=dict.fromkeys(norms, stats.num_samples))


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Weights (out, in) by layer name."""
    checkpoint = Checkpoint.open(str(folder))
    layers = take_apart(checkpoint, torch.float32).layers
    weights = {x.spec.name: checkpoint.read(x.spec.weight_key) for x in layers}
    return {
        x.spec.name: weights[x.spec.name].T if x.spec.transposed else weights[x.spec.name]
        for x in layers
    }


def assert_close(got: np.ndarray, expected: Tensor, rtol: float) -> None:
    """Relative to each value, with a floor of `rtol` of the array's root mean square."""
    rms = float(expected.square().mean().sqrt())
    np.testing.assert_allclose(got, expected.numpy(), rtol=rtol, atol=rtol * rms)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of the family."""
    return save_tiny(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def reference(family: str) -> dict[str, dict[str, Tensor]]:
    """Statistics by plain autograd, one sample at a time."""
    return reference_statistics(tiny_model(family), IDS)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_statistics_equal_plain_autograd(
    folder: Path, reference: dict[str, dict[str, Tensor]], batch_size: int
) -> None:
    """Every statistic of every layer is within 1e-5 of the reference, at any batch size."""
    got = collected(folder, batch_size)
    assert set(got) == set(reference)
    for name, stats in got.items():
        assert stats.num_samples == NUM_SAMPLES
        assert ".experts." in name or stats.num_tokens == NUM_SAMPLES * SEQ_LEN
        for statistic in STATISTICS:
            expected = reference[name][statistic]
            if statistic in SECOND_MOMENTS:
                expected = expected[*torch.triu_indices(*expected.shape)]
            assert_close(stats.arrays[statistic], expected, 1e-5)


@pytest.mark.parametrize(
    ("method", "grad_norm"),
    [("magnitude", "l1"), ("wanda", "l1"), ("ria", "l1"), ("fisher", "l1")]
    + [
        (method, norm)
        for method in ("gradient", "gblm", "gradient-ria")
        for norm in ("l1", "l2", "sum")
    ],
)
def test_masks_equal_the_reference(
    folder: Path, reference: dict[str, dict[str, Tensor]], method: str, grad_norm: str
) -> None:
    """Every method's masks are those of float64 scores on plain autograd's statistics."""
    got, weights = collected(folder, 2), weights_of(folder)
    for name, stats in got.items():
        chosen = find_score(method, grad_norm, 100.0)
        score = score_weights(weights[name], norms_of(stats), chosen)
        expected = reference_score(
            method, weights[name], reference[name], NUM_SAMPLES, grad_norm=grad_norm
        )
        mask = unstructured_mask(score, exact_sparsity(0.5), Group.parse("output"))
        assert torch.equal(mask, reference_mask(expected, 0.5, "output")), name
        for pattern in ((2, 4), (4, 8)):
            assert torch.equal(
                pattern_mask(score, Pattern(*pattern)), reference_nm_mask(expected, *pattern)
            ), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_are_float32_whatever_the_model_computes_in(
    folder: Path, reference: dict[str, dict[str, Tensor]], dtype: str
) -> None:
    """16-bit models give finite float32 sums near the float32 model's."""
    for name, stats in collected(folder, 2, dtype).items():
        for statistic in ("grad_l1", "grad_l2", "act_l2"):
            array, expected = stats.arrays[statistic], reference[name][statistic]
            assert array.dtype == np.float32
            ratio = float(array.sum()) / float(expected.sum())
            assert ratio == pytest.approx(1, abs=0.2), (name, statistic)
