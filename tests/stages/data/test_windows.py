"""Windows of long texts: each document is tokenised once, and the draw is the references'."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from gradpipe.stages.data import windows
from gradpipe.stages.data.text import Text
from gradpipe.stages.data.windows import draw_samples
from tests.support.models import tiny_tokenizer
from tests.support.texts import SENTENCE

DOCUMENTS = [SENTENCE * 9, "the fox", SENTENCE * 4, SENTENCE * 6, "the dog"]
LENGTH = 24


class Counted:
    """A tokenizer that remembers what it was given."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._tokenizer = tiny_tokenizer()

    def __call__(self, text: str, **options: Any) -> Any:
        """Its tokens."""
        self.texts.append(text)
        return self._tokenizer(text, **options)


def text(documents: list[str]) -> Text:
    """Documents as a local folder's are used."""
    return Text(documents=documents, revision=None, separator="\n\n", joined=False)


def reference(documents: list[str], count: int, seed: int) -> list[list[int]]:
    """The windows of GPTQ's `get_c4`, which tokenises anew for each sample."""
    generator, drawn, tokenizer = random.Random(seed), [], tiny_tokenizer()
    for _ in range(count):
        while True:
            i = generator.randint(0, len(documents) - 1)
            ids = tokenizer(documents[i])["input_ids"]
            if len(ids) > LENGTH:
                break
        start = generator.randint(0, len(ids) - LENGTH - 1)
        drawn.append(ids[start : start + LENGTH])
    return drawn


def test_a_document_is_tokenised_once() -> None:
    """However often it is drawn; the samples are those of the reference."""
    tokenizer = Counted()
    _, calibration = draw_samples("toy", text(DOCUMENTS), tokenizer, 40, LENGTH, 3)
    assert sorted(tokenizer.texts) == sorted(DOCUMENTS)
    assert calibration.arrays["input_ids"].tolist() == reference(DOCUMENTS, 40, 3)


def test_what_is_kept_of_documents_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no room but for one document, others are tokenised again, to the same samples."""
    monkeypatch.setattr(windows, "_KEPT_TOKENS", 0)
    tokenizer = Counted()
    _, calibration = draw_samples("toy", text(DOCUMENTS), tokenizer, 40, LENGTH, 3)
    assert len(DOCUMENTS) < len(tokenizer.texts) < 60
    assert calibration.arrays["input_ids"].tolist() == reference(DOCUMENTS, 40, 3)
    one = Counted()
    draw_samples("toy", text(DOCUMENTS[:1]), one, 40, LENGTH, 3)
    assert one.texts == DOCUMENTS[:1]


def test_the_last_documents_are_kept_as_far_as_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Room for two of three: the one that was drawn longest ago goes."""
    long = [SENTENCE + word * 30 for word in (" fox", " dog", " cat")]
    size = max(len(tiny_tokenizer()(x)["input_ids"]) for x in long)
    monkeypatch.setattr(windows, "_KEPT_TOKENS", 2 * size)
    tokenizer = Counted()
    spec, calibration = draw_samples("toy", text(long), tokenizer, 30, LENGTH, 0)
    kept: list[int] = []
    expected = []
    for index in calibration.arrays["sources"][:, 0].tolist():
        if index not in kept:
            expected.append(long[index])
        kept = [*[x for x in kept if x != index], index][-2:]
    assert tokenizer.texts == expected
    assert spec.num_samples == 30


@pytest.mark.parametrize("documents", [DOCUMENTS, ["the fox runs"] * 30])
def test_progress_counts_every_window(documents: list[str]) -> None:
    """Of single documents one by one, of the joined text at once."""
    heard: list[int] = []
    draw_samples("toy", text(documents), tiny_tokenizer(), 7, LENGTH, 0, heard.append)
    assert sum(heard) == 7


def test_a_window_holds_no_document() -> None:
    """Windows are copies: what was tokenised is let go of."""
    _, calibration = draw_samples("toy", text(DOCUMENTS), tiny_tokenizer(), 4, LENGTH, 0)
    assert calibration.arrays["input_ids"].base is None
    assert calibration.arrays["input_ids"].dtype == np.int32
