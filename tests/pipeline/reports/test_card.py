"""The model card of a pruned checkpoint, which its owner may have edited."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from gradpipe import InputError, Metrics
from gradpipe.pipeline.reports.card import add_results, check_card
from gradpipe.pipeline.reports.evaluations import Evaluation

METRICS = Metrics(
    perplexity=9.5,
    model="pruned",
    dataset="notes.txt",
    dataset_config=None,
    split=None,
    revision=None,
    num_windows=4,
    seq_len=16,
    num_tokens=64,
    dtype="float32",
)


@pytest.mark.parametrize(
    "metadata",
    [
        ": : [",
        "model-index:\n- results:\n  - {task: {type: t}, dataset: {type: d, name: d}, metrics: []}",
    ],
)
def test_metadata_that_cannot_be_kept_are_refused(tmp_path: Path, metadata: str) -> None:
    """Before anything is measured: they are no YAML, or results that the Hub cannot read."""
    (tmp_path / "pruning.json").write_text("{}")
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\nmine\n")
    with pytest.raises(InputError, match=r"--card: the metadata of .*README\.md cannot be read"):
        check_card(tmp_path)


def test_what_is_in_a_card_stays(tmp_path: Path) -> None:
    """Metadata and text of its owner's; the same measured again is there once."""
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\nmine: {a: 1}\n---\nMy words.\n\n---\nmore\n")
    for _ in range(2):
        add_results(tmp_path, Evaluation(metrics=METRICS))
    text = card.read_text()
    assert text.endswith("My words.\n\n---\nmore\n")
    for words in ("license: mit", "a: 1", "name: perplexity, 4 windows of 16 tokens"):
        assert text.count(words) == 1


def test_what_is_measured_at_once_is_all_kept(tmp_path: Path) -> None:
    """A job for each text, all of one checkpoint."""
    (tmp_path / "README.md").write_text("Mine.\n")

    def add(index: int) -> None:
        add_results(tmp_path, Evaluation(metrics=replace(METRICS, dataset=f"text {index}")))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(8)))
    text = (tmp_path / "README.md").read_text()
    assert all(f"name: text {index}" in text for index in range(8))
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
