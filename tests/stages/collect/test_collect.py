"""Stage one as a whole: samples, the store it writes, and what it refuses to do quietly."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradpipe import CollectConfig, GradpipeError, InputError, collect
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.collect.resident import resident_batch
from gradpipe.stages.collect.sums import LayerAccumulator
from gradpipe.stages.model.batch import Batch
from gradpipe.stages.model.load import load_model
from tests.support.cases import collecting, written
from tests.support.stores import toy_layer


def config(root: Path, **changes: Any) -> CollectConfig:
    """A small run in `root`."""
    return collecting(root, **{"num_samples": 3, "encoding": "compact", **changes})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A model and a text."""
    return written(tmp_path)


def test_a_finished_store_is_the_same_command_s_result(root: Path) -> None:
    """The same command again has nothing to do, and tidies what a kill may have left."""
    first = collect(config(root))
    (root / "store" / "partial").mkdir()
    (root / "store" / "partial" / "stray").touch()
    assert collect(config(root)).digest == first.digest
    assert not (root / "store" / "partial").exists()
    with pytest.raises(InputError, match="exists and is complete"):
        collect(config(root, seed=1))


def test_an_unfinished_store_is_not_continued_by_another_command(root: Path) -> None:
    """Mixed settings would give sums of two things; --overwrite starts anew."""
    collect(config(root))
    (root / "store" / "commit.json").unlink()
    (root / "store" / "layers" / "stray").mkdir()
    assert collect(config(root, seed=1)).spec.samples.seed == 1
    assert not (root / "store" / "layers" / "stray").exists()


class _Twice(nn.Module):
    """One linear map, run twice: its gradient is not one product."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])
        self.dtype = torch.float32

    def forward(self, input_ids: torch.Tensor, **_: object) -> object:
        hidden = self.embed(input_ids)
        for _time in range(2):
            hidden = self.layers[0](hidden)
        return type("Output", (), {"loss": hidden.square().mean()})


def _accumulator() -> LayerAccumulator:
    spec = toy_layer("layers.0.0", (4, 4))
    return LayerAccumulator(spec, ("grad_l1",), torch.device("cpu"))


def test_a_layer_that_runs_twice_is_refused() -> None:
    """Norms of two halves are not the norm of the whole: better no number than a wrong one."""
    model, accumulator = _Twice(), _accumulator()
    sums = {"layers.0.0": accumulator}
    ids = torch.zeros((1, 3), dtype=torch.long)
    with pytest.raises(GradpipeError, match=r"runs twice.*by --blocks.*not supported"):
        resident_batch(model, sums, Batch.of_tokens(ids))


class _Apart(nn.Module):
    """Two linear maps, run in this order; the second reads a copy of what the first does."""

    def __init__(self, *order: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.maps = nn.ModuleDict({name: nn.Linear(4, 4) for name in order})
        self.dtype = torch.float32

    def forward(self, input_ids: torch.Tensor, **_: object) -> object:
        hidden = self.embed(input_ids)
        found = [layer(hidden.clone()) for layer in self.maps.values()]
        return type("Output", (), {"loss": (found[0] * found[1]).mean()})


@pytest.mark.parametrize("order", [("q", "k"), ("k", "q")])
def test_layers_that_do_not_share_their_input_after_all_are_named(order: tuple[str, str]) -> None:
    """They would keep one Hessian: whichever of them runs first."""
    q = toy_layer("maps.q", (4, 4))
    k = replace(toy_layer("maps.k", (4, 4)), input_of=q.name)
    sums = {x.name: LayerAccumulator(x, ("grad_l1",), torch.device("cpu")) for x in (q, k)}
    with pytest.raises(GradpipeError, match=r"layer maps\.k does not read the input of maps\.q"):
        resident_batch(_Apart(*order), sums, Batch.of_tokens(torch.ones(1, 3, dtype=torch.long)))


def test_a_layer_that_never_ran_is_named() -> None:
    """Zeros would read as 'this layer does not matter'."""
    with pytest.raises(GradpipeError, match=r"layers\.0\.0 never ran: .*--blocks.*not supported"):
        _accumulator().result()


def test_a_nan_stops_with_the_layer_s_name() -> None:
    """Nothing that is not a number reaches a store."""
    accumulator = _accumulator()
    x = torch.full((1, 2, 4), float("nan"))
    accumulator.add_inputs(x.unbind())
    accumulator.add_gradients(x.unbind(), torch.ones(1, 2, 4).unbind(), 1.0)
    with pytest.raises(GradpipeError, match=r"layers\.0\.0: grad_l1 is NaN"):
        accumulator.result()


def test_a_model_that_overflows_leaves_no_store(root: Path) -> None:
    """A loss that is not finite stops the run before a statistic is written."""
    checkpoint = Checkpoint.open(str(root / "model"))
    model = load_model(checkpoint, torch.float32, torch.device("cpu"))
    model.model.embed_tokens.weight.data.fill_(float("nan"))
    model.save_pretrained(root / "model")
    with pytest.raises(GradpipeError, match="loss is nan"):
        collect(config(root))
    assert not (root / "store" / "commit.json").exists()
    assert not (root / "store" / "layers" / "model.layers.0.mlp.up_proj").exists()


@pytest.mark.gpu
def test_cuda_gives_the_cpu_s_statistics(root: Path) -> None:
    """The same samples on a GPU: the same sums, to rounding."""
    on_cpu = collect(config(root, store=root / "cpu", device="cpu"))
    on_gpu = collect(config(root, store=root / "gpu", device="cuda"))
    for layer in on_cpu.spec.layers:
        for statistic in on_cpu.spec.statistics:
            expected = on_cpu.read_norms(layer, statistic)
            atol = 1e-4 * float(np.sqrt((expected**2).mean()))
            got = on_gpu.read_norms(layer, statistic)
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=atol)
