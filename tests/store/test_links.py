"""Links in a store's folder: nothing is written through them, whoever has put them there."""

from pathlib import Path

import pytest

from gradpipe import GradpipeError, InputError, collect
from gradpipe.store.lock import locked
from gradpipe.store.objects import replacing
from tests.support.cases import collecting


@pytest.mark.parametrize("name", ["layers", "partial", "calibration"])
def test_a_store_is_not_collected_through_a_link(inputs: Path, tmp_path: Path, name: str) -> None:
    """It could not be read afterwards: refused before any work."""
    store, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    store.mkdir()
    elsewhere.mkdir()
    (store / "zarr.json").write_text('{"zarr_format":3,"attributes":{"gradpipe":{}}}')  # begun
    (store / name).symlink_to(elsewhere)
    with pytest.raises(InputError, match=f"{name} in it is a link"):
        collect(collecting(inputs, store))
    assert not [*elsewhere.iterdir()]


def test_a_lock_is_no_link(inputs: Path, tmp_path: Path) -> None:
    """What it leads to keeps what is in it."""
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".lock").symlink_to(thesis)
    with pytest.raises(GradpipeError, match=r"cannot lock .*store/\.lock"):
        collect(collecting(inputs, tmp_path / "store"))
    with (
        pytest.raises(GradpipeError, match="cannot lock"),
        locked(tmp_path / "store" / ".lock", of=tmp_path, wait=True),
    ):
        pass
    assert thesis.read_text() == "years of work"


def test_a_file_on_its_way_is_no_link(tmp_path: Path) -> None:
    """Nor is what lies where it is written before it is renamed."""
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    (tmp_path / ".object.tmp").symlink_to(thesis)
    with pytest.raises(OSError, match="symbolic"), replacing(tmp_path / "object") as file:
        file.write(b"x")
    assert thesis.read_text() == "years of work"
