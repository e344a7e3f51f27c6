"""Windows of tokens: drawn from documents to calibrate, cut from joined text to evaluate.

A document that is drawn again is not tokenised again: a text file is one document, and may be long.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from gradpipe.errors import InputError
from gradpipe.stages.data.samples import Samples
from gradpipe.stages.data.text import Text

_KEPT_TOKENS = 2**26  # 256 MiB of documents, for when they are drawn again
Ids = npt.NDArray[np.int32]


def draw_samples(
    name: str,
    text: Text,
    tokenizer: Any,
    num_samples: int,
    seq_len: int,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Samples:
    """Draw `num_samples` windows of `seq_len` tokens, each at a random place of a random document.

    Documents that are too short are passed over. Where all of them are, or where that is the
    preset's way, windows come from the joined text. `advance` hears of windows drawn. Raises
    InputError if the text is too short, or a document of it cannot be read.
    """
    tokens = _Tokens(text, tokenizer)
    generator = random.Random(seed)
    drawn = None
    if not text.joined:
        drawn = _draw_from_documents(tokens, num_samples, seq_len, generator, advance)
    sampling = "joined" if drawn is None else "document"
    if drawn is None:
        generator.seed(seed)
        drawn = _draw_from_joined(name, tokens, num_samples, seq_len, generator)
        advance(num_samples)
    return Samples.of(
        {
            "input_ids": np.array([ids for ids, _ in drawn], dtype=np.int32),
            "sources": np.array([source for _, source in drawn], dtype=np.int64),
        },
        dataset=name,
        revision=text.revision,
        sampling=f"chat {sampling}" if text.is_chat else sampling,
        seed=seed,
        seq_len=seq_len,
    )


def evaluation_windows(
    name: str,
    text: Text,
    tokenizer: Any,
    seq_len: int,
    max_windows: int | None,
) -> npt.NDArray[np.int64]:
    """The joined text in windows that do not overlap, (windows, seq_len); the tail is dropped."""
    ids = _Tokens(text, tokenizer).joined()
    count = len(ids) // seq_len
    limits = [limit for limit in (max_windows, text.max_windows) if limit is not None]
    if count == 0:
        raise _too_short(name, len(ids), seq_len)
    count = min([count, *limits])
    return ids[: count * seq_len].astype(np.int64).reshape(count, seq_len)


_Drawn = list[tuple[Ids, tuple[int, int]]]  # tokens; document (-1 if joined), first token


class _Tokens:
    """The tokens of a text's documents; the last ones that were asked for are kept."""

    def __init__(self, text: Text, tokenizer: Any) -> None:
        self.num_documents = len(text.documents)
        self._text = text
        self._tokenizer = tokenizer
        self._kept: dict[int, Ids] = {}  # the one that was asked for last stands last
        self._num_kept = 0  # tokens

    def document(self, index: int) -> Ids:
        """The tokens of one document."""
        if index in self._kept:
            self._kept[index] = self._kept.pop(index)
            return self._kept[index]
        ids = self._kept[index] = self._tokenize(self._text.documents[index])
        self._num_kept += len(ids)
        while len(self._kept) > 1 and self._num_kept > _KEPT_TOKENS:
            self._num_kept -= len(self._kept.pop(next(iter(self._kept))))
        return ids

    def joined(self) -> Ids:
        """The tokens of all documents as one text."""
        return self._tokenize(self._text.separator.join(self._text.documents))

    def _tokenize(self, text: str) -> Ids:
        """`verbose=False` because windows are cut later, so that no text is too long.

        A conversation has its special tokens from the template.
        """
        made = self._tokenizer(text, verbose=False, add_special_tokens=not self._text.is_chat)
        return np.array(made["input_ids"], dtype=np.int32)


def _draw_from_documents(
    tokens: _Tokens,
    num_samples: int,
    seq_len: int,
    generator: random.Random,
    advance: Callable[[int], None],
) -> _Drawn | None:
    """Windows of single documents; None if no document is longer than `seq_len` tokens."""
    short: set[int] = set()
    drawn: _Drawn = []
    while len(drawn) < num_samples:
        if len(short) == tokens.num_documents:
            return None
        index = generator.randint(0, tokens.num_documents - 1)
        if index in short:
            continue
        ids = tokens.document(index)
        if len(ids) <= seq_len:
            short.add(index)
            continue
        start = generator.randint(0, len(ids) - seq_len - 1)
        drawn.append((ids[start : start + seq_len].copy(), (index, start)))
        advance(1)
    return drawn


def _draw_from_joined(
    name: str,
    tokens: _Tokens,
    num_samples: int,
    seq_len: int,
    generator: random.Random,
) -> _Drawn:
    ids = tokens.joined()
    if len(ids) <= seq_len:
        raise _too_short(name, len(ids), seq_len)
    starts = [generator.randint(0, len(ids) - seq_len - 1) for _ in range(num_samples)]
    return [(ids[start : start + seq_len], (-1, start)) for start in starts]


def _too_short(name: str, num_tokens: int, seq_len: int) -> InputError:
    return InputError(
        f"dataset {name} is too short: {num_tokens} tokens in all, --seq-len {seq_len} needs more; "
        "give more text or a smaller --seq-len"
    )
