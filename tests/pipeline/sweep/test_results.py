"""`results.jsonl`: whole lines, each once, whoever writes and whoever is killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gradpipe.pipeline.reports.points import Metric, Named, PointResult
from gradpipe.pipeline.sweep.results import ResultsFile

_WRITER = """
import sys
from pathlib import Path
from gradpipe.pipeline.sweep.results import ResultsFile
from tests.pipeline.sweep.test_results import result
file = ResultsFile(Path(sys.argv[1]))
for key in sys.argv[2:]:
    file.append(result(key))
"""


def result(key: str) -> PointResult:
    """The dense model's line under a key."""
    named = Named(name="name", digest="0" * 32)
    return PointResult(
        key=key,
        study=None,
        point=None,
        options={},
        model=named,
        store=named,
        metric=Metric(name="perplexity", value=9.5, tokens=4096),
        zeros={"pruned": 0.0},
        layers={f"layer.{index}": 0.0 for index in range(200)},
        seconds={"prune": 0.0, "evaluate": 1.0},
        versions={"gradpipe": "0"},
    )


def test_processes_append_whole_lines(tmp_path: Path) -> None:
    """Four at a time, of keys that overlap: each key has one line, and each line is whole."""
    keys = [[f"{index}" for index in range(start, start + 12)] for start in (0, 4, 8, 12)]
    root = Path(__file__).parents[3]
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path), *some], cwd=root)
        for some in keys
    ]
    assert [writer.wait() for writer in writers] == [0] * 4
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["key"] for line in lines) == sorted(map(str, range(24)))
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def test_a_torn_line_is_cut_by_whoever_writes_next(tmp_path: Path) -> None:
    """Read, it is none; what is whole before it stays, byte for byte."""
    file = ResultsFile(tmp_path)
    file.append(result("a"))
    whole = file.path.read_bytes()
    for torn in (whole[:-1], whole[:40], b"{"):
        file.path.write_bytes(whole + torn)
        assert list(file.read()) == ["a"]
        file.append(result("b"))
        assert list(file.read()) == ["a", "b"]
        assert file.path.read_bytes().startswith(whole)
    assert len(file.path.read_bytes().splitlines()) == 2


def test_a_file_that_another_process_begins_meanwhile_is_a_sweep_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards that start at once find an empty folder, and then one with the first's line."""
    file, listed = ResultsFile(tmp_path), Path.iterdir

    def late(folder: Path) -> object:
        file.path.touch()
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", late)
    file.check(())
