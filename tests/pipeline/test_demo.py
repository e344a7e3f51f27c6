"""The demo: the main job on the embedded model, here with fewer rows and less text."""

from pathlib import Path
from unittest import mock

import pytest

from gradpipe import InputError, demo
from gradpipe.pipeline import demo as demonstrating

ROWS = tuple(row for row in demonstrating.ROWS if row[0] in {"magnitude", "gblm l1", "best"})


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three methods at 50 % and 2:4."""
    monkeypatch.setattr(demonstrating, "ROWS", ROWS)
    monkeypatch.setattr(demonstrating, "SPARSITIES", (0.5,))
    monkeypatch.setattr(demonstrating, "PATTERNS", ("2:4",))


@pytest.mark.slow
def test_the_demo_shows_what_methods_cost_and_goes_on(tmp_path: Path) -> None:
    """Dense is best, gblm beats magnitude, the recipe beats both; killed, the same call goes on."""
    out = tmp_path / "demo"
    with (
        mock.patch.object(demonstrating, "evaluate_each", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        demo(out)
    result = demo(out)
    for label in ("s0.50", "2-4"):
        magnitude, gblm, best = (result.perplexities[name][label] for name, _ in ROWS)
        assert result.dense < best < gblm < magnitude
    assert (out / "gblm-l1" / "2-4" / "pruning.json").is_file()


def test_the_demo_leaves_other_folders_alone(tmp_path: Path) -> None:
    """A folder that no demo made is not written into."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists"):
        demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
