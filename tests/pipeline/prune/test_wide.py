"""Layers whose second moments are too wide: refused in one line, or said before the hours."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gradpipe import InputError, collect, prune
from gradpipe.pipeline.prune import wide
from gradpipe.pipeline.prune.wide import check_decompositions
from gradpipe.stages.prune.methods import METHODS, UPDATES, ChosenMethod
from gradpipe.stages.prune.target import Group
from gradpipe.store.schema import LayerSpec
from tests.support.cases import collecting, files_of, pruning, written
from tests.support.stores import toy_layer

CPU = torch.device("cpu")
ALPS = ChosenMethod(
    method=METHODS["alps"],
    score=None,
    update=UPDATES["none"],
    curvature="kfac",
    group=Group.parse("layer"),
)


def layer(rows: int, columns: int) -> LayerSpec:
    """A layer of a shape, and no more."""
    return toy_layer(f"{rows}x{columns}", (rows, columns))


def test_a_wide_layer_is_told_of_with_its_time() -> None:
    """The widest side that the curvature reads: inputs alone, or outputs too."""
    layers = [layer(28672, 8192), layer(64, 64)]
    said = check_decompositions(layers, "alps", ALPS, CPU)
    assert said is not None
    assert said.startswith("layer 28672x8192: its second moments are 28672 x 28672, and alps takes")
    assert "about 59 minutes of a core" in said
    assert check_decompositions(layers, "alps", replace(ALPS, curvature="input"), CPU) is None


def test_the_widest_that_lapack_counts_is_the_limit() -> None:
    """One more would end the process; a GPU's library has no such limit."""
    assert check_decompositions([layer(8, 32766)], "alps", ALPS, CPU) is not None
    assert 1 + 6 * 32766 + 2 * 32766**2 < 2**31 <= 1 + 6 * 32767 + 2 * 32767**2
    with pytest.raises(InputError, match=r"32767 x 32767.*up to 32766: use --device cuda, or"):
        check_decompositions([layer(8, 32767)], "alps", ALPS, CPU)
    assert check_decompositions([layer(8, 32767)], "alps", ALPS, torch.device("cuda")) is None


def test_a_method_that_decomposes_nothing_has_no_limit() -> None:
    """SparseGPT factors, least squares only multiplies."""
    factors = replace(ALPS, method=METHODS["sparsegpt"], curvature="input")
    assert check_decompositions([layer(8, 10**6)], "sparsegpt", factors, CPU) is None


def test_prune_says_it_first_or_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the command's own run, and nothing is left where it is refused."""
    written(tmp_path)
    collect(collecting(tmp_path, num_samples=2, statistics=("hessian", "grad_cov")))
    config = pruning(tmp_path, tmp_path / "out", method="alps", curvature="kfac")
    monkeypatch.setattr(wide, "_LONG", 56)
    console = Console(file=StringIO(), width=300)
    prune(config, console)
    assert isinstance(console.file, StringIO)
    assert "second moments are 56 x 56" in console.file.getvalue().splitlines()[0]
    before = files_of(tmp_path)
    monkeypatch.setattr(wide, "_WIDEST_ON_CPU", 55)
    with pytest.raises(InputError, match="up to 55"):
        prune(replace(config, out=tmp_path / "new"))
    assert files_of(tmp_path) == before
