"""Weights that `prune` wrote, held against the float64 oracles: from store to file."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from rich.console import Console
from torch import Tensor

from gradpipe import collect, open_store, prune
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.store.objects import CommitRecord, digest
from gradpipe.store.schema import LayerSpec
from tests.support.cases import collecting, pruning
from tests.support.models import save_tiny
from tests.support.reference import reference_mask, reference_nm_mask, reference_score
from tests.support.reference_solvers import (
    damped,
    reference_alps_mask,
    reference_cost,
    reference_least_squares,
    reference_sparsegpt,
)
from tests.support.texts import write_text

Choose = Callable[[Tensor, int], Tensor]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, of nn.Linear or of Conv1D, and its store of exact sums."""
    root = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, root / "model")
    write_text(root / "text.txt")
    collect(collecting(root, statistics=("act_l2", "hessian", "grad_cov")))
    return root


class Case:
    """One layer before and after, (out, in), with its second moments, damped, in float64."""

    def __init__(self, root: Path, out: Path, layer: LayerSpec) -> None:
        """Read them back from the files."""
        weights = [Checkpoint.open(str(x)).read(layer.weight_key) for x in (root / "model", out)]
        dense, pruned = (x.T.double() if layer.transposed else x.double() for x in weights)
        self.dense, self.pruned, self.found = dense, pruned, pruned != 0
        store = open_store(root / "store")
        self.hessian = damped(whole(store.read_norms(layer, "hessian")), 0.01)
        self.cov = damped(whole(store.read_norms(layer, "grad_cov")), 0.1)
        act = torch.from_numpy(store.read_norms(layer, "act_l2")).double().square()
        self.wanda = reference_score("wanda", dense, {"act_l2": act}, 4)

    def check_least_squares(self, cov: Tensor | None) -> None:
        """At least 98 % of what the normal equations gain on the support, by the same curvature."""
        best = reference_least_squares(self.dense, self.found, self.hessian, cov)
        changes = (self.dense * self.found, best, self.pruned)
        start, least, reached = (reference_cost(self.dense - x, self.hessian, cov) for x in changes)
        assert reached - least <= 0.02 * (start - least)


def whole(packed: np.ndarray[Any, np.dtype[np.float32]]) -> Tensor:
    """The symmetric matrix of an upper triangle, row by row."""
    width = int((2 * len(packed)) ** 0.5)
    matrix = torch.zeros(width, width, dtype=torch.float64)
    matrix[*torch.triu_indices(width, width)] = torch.from_numpy(packed).double()
    return matrix + matrix.triu(diagonal=1).T


def written(root: Path, out: Path, most: int, **options: Any) -> list[Case]:
    """The first block's layers of at most so many weights, pruned by half."""
    prune(pruning(root, out, **options))
    layers = [x for x in open_store(root / "store").spec.layers if x.block == 0]
    smallest = min(x.num_weights for x in layers)
    return [Case(root, out, x) for x in layers if x.num_weights <= max(most, smallest)]


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_sparsegpt_writes_its_own_weights(root: Path, tmp_path: Path, pattern: str | None) -> None:
    """Which go, and what becomes of the others."""
    patterns = () if pattern is None else (pattern,)
    for case in written(root, tmp_path / "out", 4096, method="sparsegpt", patterns=patterns):

        def choose(scores: Tensor, start: int, case: Case = case) -> Tensor:
            part = slice(start, start + scores.shape[1])
            wanted = reference_nm_mask(scores, 2, 4) if pattern else lowest_half(scores)
            odd = case.found[:, part] != wanted
            if bool(odd.any()):  # ties, in float32
                assert float(scores[odd].max()) < float(scores[odd].min()) * (1 + 1e-3)
            return case.found[:, part]

        width = 4 if pattern else case.dense.shape[1]
        expected, _ = reference_sparsegpt(case.dense, case.hessian, choose, width)
        close(case.pruned, expected)


def lowest_half(scores: Tensor) -> Tensor:
    """Half of all go."""
    return reference_mask(scores, 0.5, "layer")


def close(got: Tensor, expected: Tensor) -> None:
    """Equal, but for float32."""
    scale = float(expected.square().mean().sqrt())
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * scale)


def test_obs_writes_wandas_mask_and_the_sweep_on_it(root: Path, tmp_path: Path) -> None:
    """The mask is the score's, the weights are SparseGPT's."""
    for case in written(root, tmp_path / "out", 4096, method="wanda", update="obs"):
        mask = reference_mask(case.wanda, 0.5, "output")
        assert torch.equal(case.found, mask)
        expected, _ = reference_sparsegpt(
            case.dense, case.hessian, lambda *_, mask=mask: mask, case.dense.shape[1]
        )
        close(case.pruned, expected)


@pytest.mark.parametrize("curvature", ["input", "kfac"])
def test_lsq_writes_wandas_mask_and_the_least_squares_on_it(
    root: Path, tmp_path: Path, curvature: str
) -> None:
    """By the curvature that was asked for."""
    options = {"method": "wanda", "update": "lsq", "curvature": curvature}
    for case in written(root, tmp_path / "out", 2048, **options):
        assert torch.equal(case.found, reference_mask(case.wanda, 0.5, "output"))
        case.check_least_squares(case.cov if curvature == "kfac" else None)


@pytest.mark.parametrize("curvature", ["input", "kfac"])
def test_alps_writes_its_own_support_and_the_least_squares_on_it(
    root: Path, tmp_path: Path, curvature: str
) -> None:
    """Compared by the layer, under the curvature that was asked for; float32 may flip a few."""
    for case in written(root, tmp_path / "out", 0, method="alps", curvature=curvature):
        cov = case.cov if curvature == "kfac" else None
        mask = reference_alps_mask(case.dense, case.hessian, cov, lowest_half)
        assert int((case.found != mask).sum()) <= 0.005 * mask.numel()
        case.check_least_squares(cov)


def test_more_damping_is_printed_and_recorded(root: Path, tmp_path: Path) -> None:
    """A store whose Hessian rounding has made indefinite: one line, and the same in the report."""
    shutil.copytree(root / "store", tmp_path / "store")
    layer = open_store(root / "store").spec.layers[0]
    key = f"layers/{layer.name}/hessian/values"
    array = zarr.open_array(tmp_path / "store" / key, mode="r+")
    matrix = whole(np.asarray(array[...]))
    least, mean = float(torch.linalg.eigvalsh(matrix)[0]), float(matrix.diagonal().mean())
    matrix -= (least + 0.05 * mean) * torch.eye(len(matrix))
    array[...] = matrix[*torch.triu_indices(*matrix.shape)].float().numpy()
    commit = tmp_path / "store" / "commit.json"
    record = CommitRecord.from_bytes(commit.read_bytes())
    data = (tmp_path / "store" / key / "c" / "0").read_bytes()
    record.objects[f"{key}/c/0"] = (len(data), digest(data))
    commit.write_bytes(record.to_bytes())
    said = io.StringIO()
    target = {"store": str(tmp_path / "store"), "method": "sparsegpt", "include": (layer.name,)}
    config = pruning(root, tmp_path / "out", **target)
    prune(config, Console(file=said, width=200))
    note = f"{layer.name}: hessian is ill-conditioned: damped by 0.1"
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["notes"] == [note]
    assert note in said.getvalue().splitlines()
