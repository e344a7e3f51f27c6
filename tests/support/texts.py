"""Small texts for tests."""

from pathlib import Path

SENTENCE = "the quick brown fox jumps over the lazy dog and runs home again. "


def write_text(path: Path, repeats: int = 20) -> Path:
    """A text of a few hundred tokens, all of them known to the toy tokenizer."""
    path.write_text(SENTENCE * repeats)
    return path
