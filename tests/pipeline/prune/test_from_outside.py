"""Methods and allocations added from outside: one entry, and everything else follows from it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradpipe import InputError, PruneConfig, collect, open_store, prune
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.prune.allocation import ALLOCATIONS, AllocationRule
from gradpipe.stages.prune.mask import budget_mask
from gradpipe.stages.prune.methods import METHODS, Method
from gradpipe.stages.prune.solver import LayerProblem
from gradpipe.stages.prune.target import Budget, Target
from gradpipe.store.schema import LayerSpec
from tests.support.cases import collecting, pruning, written
from tests.support.reference import reference_mask
from tests.support.workplace import succeed


class Halving:
    """A toy solver: what has the larger gradient stays, at half its size."""

    def __init__(self, problem: LayerProblem) -> None:
        """Keep what it needs."""
        self.weight_OI, self.group = problem.weight, problem.group
        self.score_OI = problem.statistics.scaled("grad_l1")

    def to(self, budget: Budget) -> tuple[Tensor, Tensor]:
        """Weights and mask."""
        return self.weight_OI / 2, budget_mask(self.score_OI, budget, self.group)


class Trace:
    """A toy solver that reads a curvature: inputs of small second moment go, in every row."""

    def __init__(self, problem: LayerProblem) -> None:
        """Score by the diagonal alone."""
        self.weight_OI, self.group = problem.weight, problem.group
        self.score_OI = problem.curvature.diagonal().expand_as(problem.weight).float()

    def to(self, budget: Budget) -> tuple[Tensor, Tensor]:
        """Weights and mask."""
        return self.weight_OI, budget_mask(self.score_OI, budget, self.group)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its store, sums exact."""
    root = written(tmp_path_factory.mktemp("outside"))
    collect(collecting(root, statistics=("grad_l1", "grad_l2", "act_l2", "hessian", "grad_cov")))
    return root


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four entries, and nothing else, in tables that are back to themselves afterwards."""
    halving = Method(solver=Halving, reads=("grad_l1",), group="layer")
    trace = Method(solver=Trace, curvatures=("input", "kfac"), compares="whole inputs")
    monkeypatch.setitem(METHODS, "halving", halving)
    monkeypatch.setitem(METHODS, "trace", trace)
    monkeypatch.setitem(METHODS, "squared", Method(formula="W**2*X"))
    monkeypatch.setitem(ALLOCATIONS, "last-first", AllocationRule(wish=_last_first))


def _last_first(
    layers: Mapping[str, LayerSpec], targets: Sequence[Target], _: object
) -> list[dict[str, float]]:
    """Twice the sparsity in the second of two equal blocks, nothing in the first."""
    return [
        {name: 2 * target.sparsity * (layer.block or 0) for name, layer in layers.items()}
        for target in targets
    ]


def report_of(out: Path) -> dict[str, Any]:
    """`pruning.json`."""
    document: dict[str, Any] = json.loads((out / "pruning.json").read_text())
    return document


def test_a_toy_solver_runs_as_itself(root: Path, tmp_path: Path) -> None:
    """By its own statistics, group and weights: never as another method that has no formula."""
    prune(pruning(root, tmp_path / "out", method="halving"))
    store = open_store(root / "store")
    before, after = Checkpoint.open(str(root / "model")), Checkpoint.open(str(tmp_path / "out"))
    for layer in store.spec.layers:
        score = torch.from_numpy(store.read_norms(layer, "grad_l1"))
        mask = reference_mask(score, 0.5, "layer")
        assert torch.equal(after.read(layer.weight_key), before.read(layer.weight_key) / 2 * mask)
    report = report_of(tmp_path / "out")
    assert report["method"] == "halving"
    assert report["statistics"] == ["grad_l1"]
    assert (report["score"], report["group"]) == (None, "layer")


def test_a_toy_solver_takes_what_its_entry_names(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command: targets, a group, allocations and shards, as any method does."""
    out = tmp_path / "out"
    words = f"prune {root}/model {root}/store {out} --method halving --group output --sparsity 0.3"
    for shard in ("0/2", "1/2"):
        succeed(f"{words} --pattern 2:4 --allocation owl --shard {shard}", monkeypatch)
    assert {path.name for path in out.iterdir()} == {"s0.30", "2-4"}
    assert report_of(out / "s0.30")["statistics"] == ["grad_l1", "act_l2"]
    assert "--method halving" in report_of(out / "2-4")["command"]


@pytest.mark.parametrize("curvature", ["input", "kfac"])
def test_a_toy_solver_gets_its_curvature(root: Path, tmp_path: Path, curvature: str) -> None:
    """Damped second moments, those of the curvature chosen."""
    [result] = prune(pruning(root, tmp_path / "out", method="trace", curvature=curvature))
    assert result.achieved == pytest.approx(0.5, abs=0.02)
    expected = {"input": ["hessian"], "kfac": ["hessian", "grad_cov"]}
    assert report_of(tmp_path / "out")["statistics"] == expected[curvature]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "halving", "update": "obs"}, "halving updates weights by itself"),
        ({"method": "halving", "score": "abs(W)"}, "has no score"),
        ({"method": "halving", "group": "global"}, "choose a method with a score"),
        ({"method": "halving", "curvature": "kfac"}, "alps and trace use it"),
        ({"method": "trace", "group": "layer"}, "trace compares within whole inputs"),
        ({"allocation": "owl", "allocation_score": "halving"}, "no score of its own"),
        ({"allocation": "last-first", "allocation_score": "wanda"}, "uses none"),
    ],
)
def test_options_that_an_entry_does_not_take_are_refused(
    options: dict[str, Any], said: str
) -> None:
    """Each refusal reads the entry; none knows a method by name."""
    with pytest.raises(InputError, match=said):
        PruneConfig(model="embedded", store="s", out=Path("out"), **options)


def test_a_recipe_leaves_out_what_an_entry_does_not_take() -> None:
    """The recipe's curvature goes beside a method that minimises none, and stays beside one."""
    chosen = {}
    for method in ("alps", "halving", "trace"):
        run = pruning(Path("m"), Path("out"), recipe="best", method=method)
        chosen[method] = (run.method, run.curvature, run.allocation)
    assert chosen == {
        "alps": ("alps", "kfac", "sensitivity"),
        "halving": ("halving", "input", "sensitivity"),
        "trace": ("trace", "kfac", "sensitivity"),
    }


def test_a_toy_formula_is_a_method(root: Path, tmp_path: Path) -> None:
    """The weights are those of the formula given as --score."""
    [named] = prune(pruning(root, tmp_path / "named", method="squared"))
    [given] = prune(pruning(root, tmp_path / "given", score="W**2*X"))
    files = [x.folder / "model.safetensors" for x in (named, given)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_toy_allocation_is_a_rule(root: Path, tmp_path: Path) -> None:
    """By its name, in the report as well; its wish is met in whole weights."""
    options = {"method": "magnitude", "group": "layer", "allocation": "last-first"}
    prune(pruning(root, tmp_path / "out", sparsities=(0.4,), **options))
    report = report_of(tmp_path / "out")
    assert report["allocation"] == "last-first"
    for name, layer in report["layers"].items():
        expected = 0.8 if ".1." in name else 0.0
        assert layer["achieved"] == pytest.approx(expected, abs=1 / layer["size"])


@pytest.mark.parametrize("entry", [{}, {"formula": "abs(W)", "solver": Halving}])
def test_an_entry_that_does_not_say_how_to_pick_is_none(entry: dict[str, Any]) -> None:
    """Nothing falls through to a default: what a new method runs as is what it says."""
    with pytest.raises(ValueError, match="a formula or a solver"):
        Method(**entry)
