"""The streamed schedule: the resident one's numbers, bit for bit, one block at a time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gradpipe import collect
from tests.support.cases import (
    CASES,
    EVERY,
    IMAGES,
    LLAMA,
    MECHANISMS,
    MIXTRAL,
    Case,
    Shelf,
    files_of,
)

SCHEDULES = ("resident", "streamed")
HEAD = {"include": ("lm_head",)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_streamed_is_resident(case: Case, shelf: Shelf, tmp_path: Path) -> None:
    """Every object of the store has the same bytes under either schedule."""
    run = case.collecting(
        shelf.root(case), tmp_path / "store", statistics=EVERY, schedule="streamed"
    )
    assert collect(run).digest == shelf.store(case).digest


@pytest.mark.parametrize(
    ("case", "changes"),
    [(case, HEAD) for case in (LLAMA, MIXTRAL)]  # heads that are not tied
    + [
        (case, {"include": ("classifier",), "dtype": dtype})  # its layer sees one token
        for case in IMAGES
        for dtype in ("bfloat16", "float16")
    ],
    ids=str,
)
def test_a_layer_outside_the_blocks_is_collected_too(
    case: Case, changes: dict[str, Any], shelf: Shelf, tmp_path: Path
) -> None:
    """The head has the same statistics under either schedule."""
    run = case.collecting(shelf.root(case), tmp_path / "resident", **changes)
    resident = collect(run)
    assert [layer.block for layer in resident.spec.layers].count(None) == 1
    streamed = collect(replace(run, store=tmp_path / "streamed", schedule="streamed"))
    assert streamed.digest == resident.digest


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", MECHANISMS, ids=str)
def test_activations_need_no_backward_pass(
    case: Case, schedule: str, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Collected alone, by a forward pass only, they have the bytes that they have among others."""
    everything = files_of(shelf.root(case) / "store" / "layers")
    monkeypatch.setattr(torch.Tensor, "backward", None)
    monkeypatch.setattr(torch.autograd, "grad", None)
    statistics = ("act_l2", "act_sum", "hessian")
    run = case.collecting(
        shelf.root(case), tmp_path / "store", statistics=statistics, schedule=schedule
    )
    collect(run)
    of_statistics = {key for key in everything if {*key.split("/")} & {*statistics}}
    assert len(of_statistics) >= 3 * len(statistics)
    got = files_of(run.store / "layers")
    assert {k: got[k] for k in of_statistics} == {k: everything[k] for k in of_statistics}


def test_nothing_but_the_store_is_left(shelf: Shelf, tmp_path: Path) -> None:
    """No scratch, no snapshot, no lock, inside the store or in a scratch folder of one's own."""
    run = LLAMA.collecting(
        shelf.root(LLAMA), tmp_path / "store", schedule="streamed", scratch=tmp_path / "scratch"
    )
    collect(run)
    assert not any((tmp_path / "scratch").iterdir())
    assert {p.name for p in run.store.iterdir()} == {
        *("zarr.json", "commit.json", "calibration", "layers")
    }
