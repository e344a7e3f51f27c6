"""What the hub of the tests holds, and the calls that run in the process that talks to it."""

import contextlib
import gzip
import io
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from gradpipe import CollectConfig, DataConfig, InputError, cli, collect
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.data.text import load_text
from gradpipe.stages.data.windows import draw_samples, evaluation_windows
from gradpipe.store.schema import SampleSpec, StoreSpec
from tests.support.models import tiny_tokenizer

C4_COMMIT = "607bd4c8450a42878aa9ddc051a65a055450ef87"
WIKITEXT_COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"
C4_TRAIN = "en/c4-train.00000-of-01024.json.gz"
C4_VALIDATION = "en/c4-validation.00000-of-00008.json.gz"
UNREACHABLE = "http://127.0.0.1:9"  # nothing listens on the discard port
PROSE = "the quick brown fox jumps over two lazy dogs, so; add it?"
WORDS = PROSE.split()  # all of them known to the toy tokenizer

TABLES_CARD = """---
configs:
- config_name: prose
  data_files:
  - split: train
    path: prose/train-*
  - split: test
    path: prose/test-*
- config_name: verse
  data_files:
  - split: train
    path: verse/train-*
---
"""


def sentences(count: int, longest: int, seed: int) -> list[str]:
    """Texts of 0 to `longest` words, all of them known to the toy tokenizer."""
    generator = random.Random(seed)
    return [
        " ".join(generator.choices(WORDS, k=generator.randint(0, longest))) for _ in range(count)
    ]


def write_rows(path: Path, rows: Sequence[str], column: str = "text") -> None:
    """Rows as the Hub keeps them: gzipped JSON lines, JSON lines or Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.table({column: list(rows)}), path)
        return
    extra = {"timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org/"}
    data = "".join(json.dumps({column: row, **extra}) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


SHORT, LONG = " ".join(WORDS[:4]), " ".join(WORDS)  # windows as long as these do not fit in them
TRAIN = sentences(40, longest=60, seed=1) + 10 * [SHORT, LONG]
VALIDATION = sentences(1300, longest=8, seed=2)
VALIDATION[1099:1101] = [20 * LONG, 20 * SHORT]  # the last that counts, and the next
WIKI_TRAIN, WIKI_TEST = (["", " = Rows = \n", *sentences(50, 20, seed)] for seed in (3, 4))
OWN_TRAIN, OWN_TEST = sentences(20, 40, seed=5), sentences(20, 40, seed=6)


class Drawn(NamedTuple):
    """Calibration windows, and where they are from."""

    spec: SampleSpec
    input_ids: npt.NDArray[np.int32]
    sources: npt.NDArray[np.int64]


def calibration(data: DataConfig, seq_len: int, seed: int) -> Drawn:
    """Draw six windows."""
    text = load_text(data, "calibration", tiny_tokenizer())
    spec, drawn = draw_samples(data.name, text, tiny_tokenizer(), 6, seq_len, seed)
    return Drawn(spec, **drawn.arrays)


def evaluation(data: DataConfig, seq_len: int) -> Any:
    """Cut all windows."""
    text = load_text(data, "evaluation", tiny_tokenizer())
    return evaluation_windows(data.name, text, tiny_tokenizer(), seq_len, None)


def collected(config: CollectConfig) -> StoreSpec:
    """Write a store; what it says of itself."""
    return collect(config).spec


def located(name: str) -> tuple[str | None, str]:
    """Fetch a model; its commit and the digest of its config."""
    checkpoint = Checkpoint.open(name)
    return checkpoint.revision, checkpoint.config_digest


def pipe(*words: str) -> tuple[int, str]:
    """Run the command; its exit code and what it printed to stderr."""
    stderr = io.StringIO()
    with mock.patch.object(sys, "argv", ["pipe", *words]), contextlib.redirect_stderr(stderr):
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0), stderr.getvalue()
    raise AssertionError("main always exits")


def assert_one_line(error: InputError, *parts: str) -> None:
    """The message is one line of bounded length that holds every part."""
    message = str(error)
    assert "\n" not in message
    assert len(message) < 700
    assert all(part in message for part in parts), message
