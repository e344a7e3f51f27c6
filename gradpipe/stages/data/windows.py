"""Windows of tokens: drawn from documents to calibrate, cut from joined text to evaluate."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gradpipe.errors import InputError
from gradpipe.stages.data.text import Text
from gradpipe.store.folder import Calibration
from gradpipe.store.schema import SampleSpec


def draw_samples(
    name: str,
    text: Text,
    tokenizer: Any,
    num_samples: int,
    seq_len: int,
    seed: int,
) -> tuple[SampleSpec, Calibration]:
    """Draw `num_samples` windows of `seq_len` tokens, each at a random place of a random document.

    Documents that are too short are passed over. Where all of them are, or where that is the
    preset's way, windows come from the joined text. Raises InputError if that is too short.
    """
    generator = random.Random(seed)
    drawn = None
    if not text.joined:
        drawn = _draw_from_documents(text.documents, tokenizer, num_samples, seq_len, generator)
    sampling = "joined" if drawn is None else "document"
    if drawn is None:
        generator.seed(seed)
        drawn = _draw_from_joined(name, text, tokenizer, num_samples, seq_len, generator)
    calibration = Calibration(
        arrays={
            "input_ids": np.array([ids for ids, _ in drawn], dtype=np.int32),
            "sources": np.array([source for _, source in drawn], dtype=np.int64),
        }
    )
    spec = SampleSpec(
        dataset=name,
        revision=text.revision,
        sampling=sampling,
        seed=seed,
        num_samples=num_samples,
        seq_len=seq_len,
        digest=calibration.digest,
    )
    return spec, calibration


def evaluation_windows(
    name: str,
    text: Text,
    tokenizer: Any,
    seq_len: int,
    max_windows: int | None,
) -> npt.NDArray[np.int64]:
    """The joined text in windows that do not overlap, (windows, seq_len); the tail is dropped."""
    ids = _tokenize(tokenizer, text.separator.join(text.documents))
    count = len(ids) // seq_len
    limits = [limit for limit in (max_windows, text.max_windows) if limit is not None]
    if count == 0:
        raise _too_short(name, len(ids), seq_len)
    count = min([count, *limits])
    return np.array(ids[: count * seq_len], dtype=np.int64).reshape(count, seq_len)


_Drawn = list[tuple[list[int], tuple[int, int]]]  # tokens; document (-1 if joined), first token


def _draw_from_documents(
    documents: Sequence[str],
    tokenizer: Any,
    num_samples: int,
    seq_len: int,
    generator: random.Random,
) -> _Drawn | None:
    """Windows of single documents; None if no document is longer than `seq_len` tokens."""
    short: set[int] = set()
    drawn: _Drawn = []
    while len(drawn) < num_samples:
        if len(short) == len(documents):
            return None
        index = generator.randint(0, len(documents) - 1)
        if index in short:
            continue
        ids = _tokenize(tokenizer, documents[index])
        if len(ids) <= seq_len:
            short.add(index)
            continue
        start = generator.randint(0, len(ids) - seq_len - 1)
        drawn.append((ids[start : start + seq_len], (index, start)))
    return drawn


def _draw_from_joined(
    name: str,
    text: Text,
    tokenizer: Any,
    num_samples: int,
    seq_len: int,
    generator: random.Random,
) -> _Drawn:
    ids = _tokenize(tokenizer, text.separator.join(text.documents))
    if len(ids) <= seq_len:
        raise _too_short(name, len(ids), seq_len)
    starts = [generator.randint(0, len(ids) - seq_len - 1) for _ in range(num_samples)]
    return [(ids[start : start + seq_len], (-1, start)) for start in starts]


def _tokenize(tokenizer: Any, text: str) -> list[int]:
    """Token ids; `verbose=False` because windows are cut later, so no text is too long."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def _too_short(name: str, num_tokens: int, seq_len: int) -> InputError:
    return InputError(
        f"dataset {name} is too short: {num_tokens} tokens in all, --seq-len {seq_len} needs more; "
        "give more text or a smaller --seq-len"
    )
