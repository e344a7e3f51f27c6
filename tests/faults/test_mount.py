"""OUT on a volume: a mount cannot be renamed, so that is said before the work, not after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradpipe import InputError, collect, prune
from tests.faults.test_disk import mounted
from tests.support.cases import collecting, pruning, written


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its store."""
    folder = written(tmp_path_factory.mktemp("inputs"))
    collect(collecting(folder, num_samples=2, statistics=("act_l2",)))
    return folder


def _prune(inputs: Path, out: Path, *, overwrite: bool = False) -> list[Path]:
    run = pruning(inputs, out, method="wanda", overwrite=overwrite)
    return [result.folder for result in prune(run)]


@pytest.mark.parametrize("name", ["volume", "a volume, of ours"])
def test_a_mount_point_is_refused_and_a_folder_in_it_is_filled(
    inputs: Path, tmp_path: Path, name: str
) -> None:
    """With or without --overwrite; nothing is left on it or beside it."""
    volume, link = tmp_path / name, tmp_path / "link"
    volume.mkdir()
    link.symlink_to(volume)
    with mounted(volume, "size=4m"):
        for out in (volume, link):
            for overwrite in (False, True):
                with pytest.raises(InputError, match=f"OUT {out} is a mount point.*{out}/pruned"):
                    _prune(inputs, out, overwrite=overwrite)
        assert sorted(tmp_path.iterdir()) == [*sorted([volume, link])]
        assert [*volume.iterdir()] == []
        (folder,) = _prune(inputs, volume / "pruned")
        assert (folder / "model.safetensors").is_file()


def test_an_empty_folder_is_an_output_to_fill(inputs: Path, tmp_path: Path) -> None:
    """As an empty folder is a store to fill: there is nothing in it to lose."""
    out = tmp_path / "out"
    out.mkdir()
    (folder,) = _prune(inputs, out)
    assert (folder / "model.safetensors").is_file()
    with pytest.raises(InputError, match="exists"):
        _prune(inputs, out)
