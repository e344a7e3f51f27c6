"""The page about what comes after pruning: its Python runs, in order."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from gradpipe import PruneConfig, apply_masks, export_masks, prune, verify
from tests.support.workplace import succeed

PAGE = Path(__file__).parents[2] / "docs" / "after-pruning.md"


def test_the_page_trains_a_pruned_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder with `out` and a text: the zeros that it had are there at the end."""
    monkeypatch.chdir(tmp_path)
    succeed(
        "collect-grads embedded store --dataset stdlib --seq-len 32 --num-samples 1 "
        "--statistics act_l2",
        monkeypatch,
    )
    config = PruneConfig(
        model="embedded", store="store", out=Path("out"), method="magnitude", sparsities=(0.7,)
    )
    prune(config)
    Path("text.txt").write_text(Path(re.__file__).read_text()[:8000])
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    code = "\n".join(blocks).replace("max_steps=8", "max_steps=2, use_cpu=True, report_to=[]")
    Path("page.py").write_text(code)
    runpy.run_path("page.py")
    export_masks("out", Path("masks.safetensors"))
    apply_masks("tuned", Path("masks.safetensors"), Path("again"))
    verify("again", "tuned")
    tuned, again = (Path(x, "model.safetensors").read_bytes() for x in ("tuned", "again"))
    assert tuned == again
    assert "train_loss" in capsys.readouterr().out
