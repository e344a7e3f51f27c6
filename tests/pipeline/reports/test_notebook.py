"""What a notebook shows of stores and results."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

from gradpipe import CollectConfig, DataConfig, EvalConfig, PruneConfig, collect, evaluate, prune
from gradpipe.store.facts import as_html

TEXT = DataConfig(name="stdlib")


def cells(shown: str) -> dict[str, str]:
    """The rows of a table, which must be well-formed."""
    rows = ET.fromstring(shown).iter("tr")  # noqa: S314 (our own)
    return {row[0].text or "": row[1].text or "" for row in rows}


def test_stores_results_and_metrics_show_as_tables(tmp_path: Path) -> None:
    """With the figures that the objects hold."""
    store = collect(
        CollectConfig(
            model="embedded", store=tmp_path / "store", data=TEXT, num_samples=2, seq_len=32
        )
    )
    assert cells(store._repr_html_())["digest"] == store.digest
    (result,) = prune(PruneConfig(model="embedded", store=store.url, out=tmp_path / "out"))
    shown = cells(result._repr_html_())
    assert shown["of the whole file"] == f"{result.report.file.sparsity:.4f}"
    metrics = evaluate(EvalConfig(model="embedded", data=TEXT, seq_len=32, max_windows=2))
    assert cells(metrics._repr_html_())["num_tokens"] == "64"


def test_names_are_text_and_never_markup() -> None:
    """A stranger's store may be named as it likes."""
    shown = as_html("<script>", {"<b>": "<img src=x>"})
    assert cells(shown) == {"<b>": "<img src=x>"}
    assert "<script>" not in shown
