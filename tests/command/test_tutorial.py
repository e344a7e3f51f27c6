"""The tutorial, followed word for word, and the documentation as a site."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.workplace import run_pipe

ROOT = Path(__file__).parents[2]
_BLOCKS = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_every_command_of_the_tutorial_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order, in an empty folder; at 70 % the recipe is nearer to the dense model than Wanda."""
    monkeypatch.chdir(tmp_path)
    perplexities: list[float] = []
    opened: dict[str, Any] = {}
    blocks = _BLOCKS.findall((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))
    for language, block in blocks:
        if language == "python":
            exec(block, opened)  # noqa: S102 (our own page)
            continue
        for line in block.splitlines():
            prompt, command, *words = shlex.split(line)
            assert (prompt, command) == ("$", "pipe")
            assert run_pipe(monkeypatch, *words) == 0, line
            out = capsys.readouterr().out
            if words[0] == "eval":
                perplexities.append(float(re.findall(r"perplexity:? (\d+\.\d+)", out)[0]))
    dense, wanda, best = perplexities
    assert dense < best < (dense + wanda) / 2
    assert type(opened["model"]).__name__ == "LlamaForCausalLM"
    assert Path("report.html").stat().st_size < 3e6


def test_the_documentation_builds_as_a_site(tmp_path: Path) -> None:
    """Strictly: an anchor that leads nowhere, or a function that does not exist, fails."""
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir"]
    done = subprocess.run(
        [*build, str(tmp_path / "site")],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert "gradpipe.pipeline.prune.run.prune" in page
    assert "Raises" in page
