"""A statistic that the package does not know, added from outside: one function and one entry.

It is over outputs, and no sum: the largest |y| of each output over all tokens and samples. Nothing
in the package may need to hear of it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gradpipe import (
    CollectConfig,
    GradientStore,
    StoreError,
    collect,
    collect_shard,
    merge,
    open_store,
    plan,
    prune,
)
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.store.shard import Shard
from gradpipe.store.statistics import OUT, OUTPUTS, STATISTICS, Statistic
from tests.support.cases import collecting, pruning, written
from tests.support.models import tiny_model
from tests.support.workplace import succeed


def add_largest(sums_O: Tensor, y_TO: Tensor) -> None:
    """The whole of what a newcomer writes, beside the entry."""
    sums_O.copy_(sums_O.maximum(y_TO.abs().amax(dim=0)))


LARGEST = Statistic(
    name="out_max", of=OUTPUTS, axes=(OUT,), add=add_largest, merge=np.maximum, letter="Y"
)
NAMES = ("grad_l1", "act_l2", LARGEST.name)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistic is registered."""
    monkeypatch.setitem(STATISTICS, LARGEST.name, LARGEST)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and a store with the statistic."""
    folder = written(tmp_path_factory.mktemp("inputs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STATISTICS, LARGEST.name, LARGEST)
        collect(config(folder, folder / "store"))
    return folder


def config(inputs: Path, store: Path, **options: Any) -> CollectConfig:
    """A small run, in which samples of a batch must be told apart."""
    settings: dict[str, Any] = {"num_samples": 5, "batch_size": 2, "statistics": NAMES}
    return collecting(inputs, store, **{**settings, **options})


def largest(store: GradientStore) -> dict[str, np.ndarray[Any, Any]]:
    """The statistic of every layer."""
    return {x.name: store.read_norms(x, LARGEST.name) for x in store.spec.layers}


def test_it_is_what_its_function_says(inputs: Path) -> None:
    """Against hooks on the model itself, sample by sample."""
    store = open_store(inputs / "store")
    model, seen = tiny_model("llama"), dict[str, Tensor]()
    for layer in store.spec.layers:
        model.get_submodule(layer.name).register_forward_hook(
            lambda _, __, y, name=layer.name: seen.update(
                {name: torch.maximum(seen.get(name, y.new_zeros(())), y[0].abs().amax(dim=0))}
            )
        )
    with torch.no_grad():
        for ids_T in torch.from_numpy(store.input_ids()).long():
            model(ids_T[None])
    for name, got in largest(store).items():
        np.testing.assert_allclose(got, seen[name].numpy(), rtol=1e-5)


def test_streamed_is_resident(inputs: Path, tmp_path: Path) -> None:
    """The same bytes under either schedule."""
    streamed = collect(config(inputs, tmp_path / "store", schedule="streamed"))
    assert streamed.digest == open_store(inputs / "store").digest


@pytest.mark.parametrize("schedule", ["resident", "streamed"])
def test_a_run_that_broke_off_goes_on(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    """Snapshots hold its raw values: the store is that of a run that did not break off."""
    every = 2 if schedule == "resident" else None
    run = config(inputs, tmp_path / "store", schedule=schedule, checkpoint_every=every)
    left = 60

    def add_some(sums_O: Tensor, y_TO: Tensor) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ZeroDivisionError
        add_largest(sums_O, y_TO)

    with monkeypatch.context() as patch:
        patch.setitem(STATISTICS, LARGEST.name, replace(LARGEST, add=add_some))
        with pytest.raises(ZeroDivisionError):
            collect(run)
    assert list((run.store / "partial" / "0-of-1").glob("*.json"))
    assert collect(run).digest == open_store(inputs / "store").digest


def test_shards_are_one_run(inputs: Path, tmp_path: Path) -> None:
    """A maximum of maxima, where sums would be added."""
    for index in range(2):
        collect_shard(config(inputs, tmp_path / "store", shard=Shard(index, 2)))
    merged, whole = largest(merge([tmp_path / "store"])), largest(open_store(inputs / "store"))
    assert all(np.array_equal(merged[name], whole[name]) for name in whole)


@pytest.mark.parametrize(("encoding", "rtol"), [("compact", 0.0), ("float16", 1e-3)])
def test_it_is_encoded_as_its_entry_says(
    inputs: Path, tmp_path: Path, encoding: str, rtol: float
) -> None:
    """In full where its entry names no other encoding."""
    store = collect(config(inputs, tmp_path / "store", encoding=encoding))
    store.validate()
    exact = largest(open_store(inputs / "store"))
    for name, got in largest(store).items():
        np.testing.assert_allclose(got, exact[name], rtol=rtol)


def test_the_command_line_knows_it(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`store info` names it and its size, and `store verify` reads it."""
    for verb in ("info", "verify"):
        succeed(f"store {verb} {inputs / 'store'}", monkeypatch)
    assert LARGEST.name in capsys.readouterr().out


def test_its_letter_stands_in_formulas(inputs: Path, tmp_path: Path) -> None:
    """Each row of weights is multiplied by its output's value."""
    store = open_store(inputs / "store")
    prune(pruning(inputs, tmp_path / "out", score="abs(W)*Y", group="layer"))
    before, after = (Checkpoint.open(str(x)) for x in (inputs / "model", tmp_path / "out"))
    for layer in store.spec.layers:
        score_OI = before.read(layer.weight_key).abs() * torch.from_numpy(
            store.read_norms(layer, LARGEST.name)[:, None]
        )
        kept_OI = after.read(layer.weight_key) != 0
        assert float(score_OI[kept_OI].min()) >= float(score_OI[~kept_OI].max())


def test_an_estimate_counts_it(inputs: Path, tmp_path: Path) -> None:
    """Four bytes an output in memory, and in the store with its metadata."""
    more = plan(config(inputs, tmp_path / "store", statistics=NAMES))
    less = plan(config(inputs, tmp_path / "store", statistics=NAMES[:2]))
    layers = open_store(inputs / "store").spec.layers
    assert more.resident_bytes - less.resident_bytes == 4 * sum(x.shape[0] for x in layers)
    assert more.store_bytes - less.store_bytes > 4 * sum(x.shape[0] for x in layers)


def test_a_store_with_it_is_refused_where_it_is_not_known(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever does not know how to read it names it, and says what is known."""
    monkeypatch.delitem(STATISTICS, LARGEST.name)
    with pytest.raises(StoreError, match=f"^store holds {LARGEST.name}, .* knows grad_l1, grad_l2"):
        open_store(inputs / "store")
