"""What `datasets` shows of its work: on a terminal, as ours, and nowhere else."""

from pathlib import Path

import datasets
import pytest

from gradpipe.stages.data.text import bars_on_terminals


def test_no_bars_where_there_is_no_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A log has one line of what goes wrong; afterwards bars are as they were."""
    (tmp_path / "rows.jsonl").write_text('{"text": "the fox"}\n')
    files = {"data_files": str(tmp_path / "rows.jsonl"), "split": "train"}
    before = datasets.are_progress_bars_disabled()
    with bars_on_terminals():
        rows = datasets.load_dataset("json", cache_dir=str(tmp_path / "cache"), **files)
    assert len(rows) == 1
    assert datasets.are_progress_bars_disabled() is before
    assert capfd.readouterr().err == ""
