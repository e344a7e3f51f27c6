"""Datasets of the Hub: the real clients against a hub on this machine.

What is expected is computed here, from the files that the hub serves: the windows by the sampling
of GPTQ (github.com/IST-DASLab/gptq, datautils.py), which Wanda and GBLM-Pruner share.
"""

import functools
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from gradpipe import DataConfig, InputError
from tests.support import hub as hubs
from tests.support.hub_content import (
    C4_COMMIT,
    C4_TRAIN,
    C4_VALIDATION,
    LONG,
    OWN_TEST,
    OWN_TRAIN,
    SHORT,
    TRAIN,
    VALIDATION,
    WIKI_TEST,
    WIKI_TRAIN,
    WIKITEXT_COMMIT,
    assert_one_line,
    calibration,
    evaluation,
    write_rows,
)
from tests.support.models import tiny_tokenizer

_tokenizer = functools.cache(tiny_tokenizer)


def tokens(text: str) -> list[int]:
    """The toy tokenizer's ids."""
    ids: list[int] = _tokenizer()(text)["input_ids"]
    return ids


def reference_documents(
    documents: Sequence[str], seq_len: int, seed: int
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """GPTQ's sampling of C4: six windows, and the document and first token of each."""
    random.seed(seed)
    windows, sources = [], []
    for _ in range(6):
        while True:
            i = random.randint(0, len(documents) - 1)
            ids = tokens(documents[i])
            if len(ids) > seq_len:
                break
        start = random.randint(0, len(ids) - seq_len - 1)
        windows.append(ids[start : start + seq_len])
        sources.append((i, start))
    return windows, sources


def reference_joined(text: str, seq_len: int, seed: int) -> list[list[int]]:
    """GPTQ's sampling of WikiText-2: six windows of the whole text."""
    ids = tokens(text)
    random.seed(seed)
    starts = [random.randint(0, len(ids) - seq_len - 1) for _ in range(6)]
    return [ids[start : start + seq_len] for start in starts]


def reference_windows(ids: list[int], seq_len: int) -> list[list[int]]:
    """Evaluation: the ids cut from the front; what is left over is dropped."""
    return [ids[i * seq_len : (i + 1) * seq_len] for i in range(len(ids) // seq_len)]


# The presets.


@pytest.mark.parametrize("length", [SHORT, LONG])
@pytest.mark.parametrize("seed", [0, 1, 2024])
def test_c4_calibration_is_the_references(
    client: ProcessPoolExecutor, seed: int, length: str
) -> None:
    """Same generator, same draws: documents too short are drawn again, then a place in one."""
    seq_len = len(tokens(length))
    samples = client.submit(calibration, DataConfig(name="c4"), seq_len, seed).result()
    windows, sources = reference_documents(TRAIN, seq_len, seed)
    assert samples.input_ids.tolist() == windows
    assert list(map(tuple, samples.sources.tolist())) == sources
    assert (samples.spec.sampling, samples.spec.revision) == ("document", C4_COMMIT)


def test_c4_calibration_joins_what_is_too_short(client: ProcessPoolExecutor) -> None:
    """Where no document is long enough the reference never ends; here they are joined by spaces."""
    seq_len = 1 + max(len(tokens(document)) for document in TRAIN)
    samples = client.submit(calibration, DataConfig(name="c4"), seq_len, 0).result()
    assert samples.input_ids.tolist() == reference_joined(" ".join(TRAIN), seq_len, 0)
    assert samples.spec.sampling == "joined"
    assert set(samples.sources[:, 0].tolist()) == {-1}


@pytest.mark.parametrize("seq_len", [8, 96])
def test_c4_evaluation_is_the_references(client: ProcessPoolExecutor, seq_len: int) -> None:
    """The first 1100 documents joined by spaces, and at most 256 windows of them."""
    ids = tokens(" ".join(VALIDATION[:1100]))
    assert (len(ids) > 256 * 8, len(ids) < 256 * 96) == (True, True)
    windows = client.submit(evaluation, DataConfig(name="c4"), seq_len).result()
    assert windows.tolist() == reference_windows(ids[: 256 * seq_len], seq_len)


@pytest.mark.parametrize(("seq_len", "seed"), [(16, 0), (64, 7)])
def test_wikitext_calibration_is_the_references(
    client: ProcessPoolExecutor, seed: int, seq_len: int
) -> None:
    """Windows of the train rows joined by spaces."""
    samples = client.submit(calibration, DataConfig(name="wikitext2"), seq_len, seed).result()
    assert samples.input_ids.tolist() == reference_joined(" ".join(WIKI_TRAIN), seq_len, seed)
    assert (samples.spec.sampling, samples.spec.revision) == ("joined", WIKITEXT_COMMIT)


def test_wikitext_evaluation_is_the_references(client: ProcessPoolExecutor) -> None:
    """The test rows joined by blank lines, in all the windows they fill."""
    windows = client.submit(evaluation, DataConfig(name="wikitext2"), 16).result()
    assert windows.tolist() == reference_windows(tokens("\n\n".join(WIKI_TEST)), 16)


def test_presets_fetch_one_file_of_the_pinned_commit(
    hub: hubs.Hub, client: ProcessPoolExecutor
) -> None:
    """Newer commits are not looked at, and of C4 one shard is fetched, not a terabyte."""
    client.submit(calibration, DataConfig(name="c4"), 8, 0).result()
    client.submit(evaluation, DataConfig(name="c4"), 8).result()
    client.submit(calibration, DataConfig(name="wikitext2"), 8, 0).result()
    fetched = hub.downloads("datasets/allenai/c4")
    assert fetched == {C4_TRAIN, C4_VALIDATION}
    asked = [line for line in hub.requests if "allenai/c4" in line or "Salesforce" in line]
    assert all(C4_COMMIT in line or WIKITEXT_COMMIT in line for line in asked)


# Any other dataset.


def test_a_hub_dataset_is_read_at_its_newest_commit(
    hub: hubs.Hub, client: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """The commit is recorded, follows the Hub, and can be pinned by name or by branch."""
    repo, data = "datasets/someone/texts", DataConfig(name="someone/texts")
    first, _ = hub.resolve(repo, "main")
    samples = client.submit(calibration, data, 12, 0).result()
    assert samples.spec.revision == first
    assert samples.input_ids.tolist() == reference_documents(OWN_TRAIN, 12, 0)[0]
    write_rows(tmp_path / "train-00000-of-00001.parquet", TRAIN)
    second = hub.commit(repo, tmp_path)
    for revision, commit, rows in (
        (None, second, TRAIN),
        ("main", second, TRAIN),
        (first, first, OWN_TRAIN),
    ):
        pinned = DataConfig(name="someone/texts", revision=revision)
        samples = client.submit(calibration, pinned, 12, 0).result()
        assert samples.spec.revision == commit
        assert samples.input_ids.tolist() == reference_documents(rows, 12, 0)[0]


def test_configuration_split_and_column_choose_the_text(client: ProcessPoolExecutor) -> None:
    """Calibration takes train and evaluation test, where no split is named."""
    data = DataConfig(name="someone/tables", config="prose", text_column="body")
    samples = client.submit(calibration, data, 12, 0).result()
    assert samples.input_ids.tolist() == reference_documents(OWN_TEST, 12, 0)[0]
    windows = client.submit(evaluation, data, 12).result()
    assert windows.tolist() == reference_windows(tokens("\n\n".join(OWN_TRAIN)), 12)
    data = DataConfig(name="someone/tables", config="prose", split="test", text_column="body")
    samples = client.submit(calibration, data, 12, 0).result()
    assert samples.input_ids.tolist() == reference_documents(OWN_TRAIN, 12, 0)[0]


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (DataConfig(name="someone/unheard-of"), ("Hub id", "Repository Not Found")),
        (DataConfig(name="unheard-of"), ("Hub id", "Repository Not Found")),
        (DataConfig(name="not a name!"), ("Hub id",)),
        (DataConfig(name="a/b/c"), ("Hub id",)),
        (DataConfig(name="someone/texts", revision="0" * 40), ("Revision Not Found",)),
        (DataConfig(name="someone/texts", split="dev"), ("dev", "train")),
        (DataConfig(name="someone/texts", text_column="body"), ("'body'", "text", "--text-column")),
        (DataConfig(name="someone/tables"), ("prose", "verse")),
        (DataConfig(name="someone/tables", config="drama"), ("drama", "prose", "verse")),
        (DataConfig(name="someone/nothing"), ()),
        (DataConfig(name="someone/gated"), ("gated",)),
    ],
    ids=lambda value: value.name if isinstance(value, DataConfig) else "",
)
def test_a_dataset_that_cannot_be_had_is_the_users_mistake(
    client: ProcessPoolExecutor, data: DataConfig, parts: tuple[str, ...]
) -> None:
    """One line: what was asked for, what was found, and the choices there are."""
    with pytest.raises(InputError) as caught:
        client.submit(calibration, data, 8, 0).result()
    assert_one_line(caught.value, data.name, *parts)
