"""Calls from a program of the user's: whatever that has set, they do what the commands do."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gradpipe import (
    DataConfig,
    EvalConfig,
    GradientStore,
    InputError,
    PruneConfig,
    Shard,
    collect,
    evaluate,
    open_store,
    prune,
)
from gradpipe.store.urls import is_local
from tests.support.cases import collecting, written


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    """As a notebook may set it, for good."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() is dtype
    finally:
        torch.set_default_dtype(before)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default type": lambda: default_type(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> GradientStore:
    """Of a process that has set nothing."""
    return collect(collecting(written(tmp_path_factory.mktemp("plain"))))


@pytest.mark.parametrize("schedule", ["resident", "streamed"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_what_a_caller_has_set_changes_nothing(
    setting: str, schedule: str, plain: GradientStore, tmp_path: Path
) -> None:
    """To the byte, couplings and all."""
    run = collecting(Path(plain.url).parent, tmp_path / "store", schedule=schedule)
    with SETTINGS[setting]():
        assert collect(run).digest == plain.digest


@pytest.mark.parametrize("setting", SETTINGS)
def test_nor_does_it_change_prunings_or_what_they_measure(
    setting: str, plain: GradientStore, tmp_path: Path
) -> None:
    """By second moments, which are decoded into new tensors; and a perplexity of the outcome."""
    root = Path(plain.url).parent
    moments = collecting(root, tmp_path / "store", statistics=("hessian", "grad_cov"))
    collect(moments)

    def outcome(out: Path) -> tuple[bytes, float]:
        config = PruneConfig(
            model=moments.model,
            store=str(moments.store),
            out=out,
            method="alps",
            curvature="kfac",
        )
        prune(config)
        text = DataConfig(name=str(root / "text.txt"))
        measured = evaluate(EvalConfig(model=str(out), data=text, seq_len=16, max_windows=4))
        return (out / "model.safetensors").read_bytes(), measured.perplexity

    expected = outcome(tmp_path / "plain")
    with SETTINGS[setting]():
        assert outcome(tmp_path / "set") == expected


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 2), (0, 0), (3, 2)])
def test_a_shard_is_one_of_its_number(index: int, count: int) -> None:
    """Another would have no samples, and say that it is done."""
    with pytest.raises(InputError, match="expected I/N"):
        Shard(index, count)


@pytest.mark.parametrize("name", ["a::b", "data:x", "x:y"])
def test_a_folder_may_have_a_name_that_fsspec_takes_apart(
    name: str, plain: GradientStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finished store opens, and by its name alone."""
    monkeypatch.chdir(tmp_path)
    assert is_local(name)
    collect(collecting(Path(plain.url).parent, Path(name)))
    assert open_store(name).digest == plain.digest


def test_a_store_without_a_name_is_not_the_current_folder(
    plain: GradientStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a shell's variable that is not set."""
    monkeypatch.chdir(plain.url)
    with pytest.raises(InputError, match="store '': expected a path"):
        open_store("")


@pytest.mark.parametrize("field", ["store", "scratch"])
def test_a_home_folder_that_no_shell_has_put_in_is_refused(
    field: str, plain: GradientStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a folder called `~` is made."""
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {"schedule": "streamed", field: Path("~/x")}
    with pytest.raises(InputError, match=r"~/x: only a shell knows ~"):
        collect(collecting(Path(plain.url).parent, **settings))
    assert not list(tmp_path.iterdir())
