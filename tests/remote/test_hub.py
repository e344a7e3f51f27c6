"""Models and datasets of the Hub: the real clients against a hub on this machine.

All of it runs in one other process, because the clients read where the Hub is when imported. What
is expected there is computed here, from the files that the hub serves: the windows by the sampling
of GPTQ (github.com/IST-DASLab/gptq, datautils.py), which Wanda and GBLM-Pruner share.
"""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import random
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet
import pytest

from gradpipe import (
    CollectConfig,
    DataConfig,
    EvalConfig,
    InputError,
    PruneConfig,
    cli,
    collect,
    evaluate,
    plan,
    prune,
)
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.data.text import load_text
from gradpipe.stages.data.windows import draw_samples, evaluation_windows
from gradpipe.store.schema import SampleSpec, StoreSpec
from tests.support import hub as hubs
from tests.support.models import save_tiny, tiny_tokenizer

C4_COMMIT = "607bd4c8450a42878aa9ddc051a65a055450ef87"
WIKITEXT_COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"
C4_TRAIN = "en/c4-train.00000-of-01024.json.gz"
C4_VALIDATION = "en/c4-validation.00000-of-00008.json.gz"
UNREACHABLE = "http://127.0.0.1:9"  # nothing listens on the discard port
WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "two",
    "lazy",
    "dogs,",
    "so;",
    "add",
    "it?",
)

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


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hubs.Hub]:
    """The presets' datasets at their pinned commits, each with a newer one; two of someone's."""
    root = tmp_path_factory.mktemp("hub")
    write_rows(root / "c4" / C4_TRAIN, TRAIN)
    write_rows(root / "c4" / C4_VALIDATION, VALIDATION)
    for split, rows in (("train", WIKI_TRAIN), ("validation", []), ("test", WIKI_TEST)):
        name = f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet"
        write_rows(root / "wikitext" / name, rows)
    write_rows(root / "texts" / "data" / "train-00000-of-00001.parquet", OWN_TRAIN)
    write_rows(root / "texts" / "data" / "test-00000-of-00001.parquet", OWN_TEST)
    write_rows(root / "tables" / "prose" / "train-0.jsonl", OWN_TEST, column="body")
    write_rows(root / "tables" / "prose" / "test-0.jsonl", OWN_TRAIN, column="body")
    write_rows(root / "tables" / "verse" / "train-0.jsonl", OWN_TRAIN, column="body")
    (root / "tables" / "README.md").write_text(TABLES_CARD)
    (root / "empty").mkdir()
    (root / "empty" / ".gitattributes").write_text("*.bin filter=lfs\n")
    save_tiny("llama", root / "tiny", max_shard_size="20KB")
    (root / "tiny" / "LICENSE").write_text("all rights to all\n")
    (root / "tiny" / "pytorch_model.bin").write_bytes(b"a pickle that must not travel")
    (root / "pickled").mkdir()
    (root / "pickled" / "config.json").write_bytes((root / "tiny" / "config.json").read_bytes())
    (root / "pickled" / "pytorch_model.bin").write_bytes(b"a pickle that must not travel")
    with hubs.serve() as hub:
        hub.commit("datasets/allenai/c4", root / "c4", C4_COMMIT)
        hub.commit("datasets/Salesforce/wikitext", root / "wikitext", WIKITEXT_COMMIT)
        hub.commit("datasets/allenai/c4", root / "empty")
        hub.commit("datasets/Salesforce/wikitext", root / "empty")
        hub.commit("datasets/someone/texts", root / "texts")
        hub.commit("datasets/someone/tables", root / "tables")
        hub.commit("datasets/someone/nothing", root / "empty")
        hub.commit("models/someone/tiny", root / "tiny")
        hub.commit("models/someone/pickled", root / "pickled")
        hub.commit("models/someone/nothing", root / "empty")
        for kind in hubs.KINDS:
            hub.commit(f"{kind}/someone/gated", root / "empty")
            hub.gated.add(f"{kind}/someone/gated")
        yield hub


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clients' folder, empty at first."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def client(hub: hubs.Hub, cache: Path) -> Iterator[ProcessPoolExecutor]:
    """The process that the library runs in."""
    with hubs.client(hub.endpoint, cache) as pool:
        yield pool


# What runs in the other process.


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


# What the reference does.


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


def assert_one_line(error: InputError, *parts: str) -> None:
    """The message is one line of bounded length that holds every part."""
    message = str(error)
    assert "\n" not in message
    assert len(message) < 700
    assert all(part in message for part in parts), message


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


# Models.


def test_a_hub_model_goes_the_whole_way(
    hub: hubs.Hub, client: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """Collect, prune and evaluate fetch safetensors, record the commit and notice a newer one."""
    repo = "models/someone/tiny"
    commit, folder = hub.resolve(repo, "main")
    config = CollectConfig(
        model="someone/tiny", store=tmp_path / "store", num_samples=3, seq_len=12
    )
    spec = client.submit(collected, config).result()
    assert (spec.model.name, spec.model.revision) == ("someone/tiny", commit)
    assert (spec.samples.dataset, spec.samples.revision) == ("c4", C4_COMMIT)
    assert "someone/tiny" in spec.command

    options = PruneConfig(model="someone/tiny", store=str(tmp_path / "store"), out=tmp_path / "out")
    (result,) = client.submit(prune, options).result()
    report = json.loads((result.folder / "pruning.json").read_text())
    assert (report["model"], report["revision"]) == ("someone/tiny", commit)
    assert {p.name for p in result.folder.glob("*.safetensors")} == {
        p.name for p in folder.glob("*.safetensors")
    }
    metrics = client.submit(evaluate, EvalConfig(model="someone/tiny", seq_len=16)).result()
    assert metrics.revision == WIKITEXT_COMMIT

    served = {p.name for p in folder.iterdir()}
    assert hub.downloads(repo) == served - {"pytorch_model.bin"}
    assert not any("pytorch_model.bin" in line for line in hub.requests)

    hub.commit(repo, save_tiny("llama", tmp_path / "newer", seed=1))
    options = PruneConfig(
        model="someone/tiny", store=str(tmp_path / "store"), out=tmp_path / "again"
    )
    with pytest.raises(InputError, match=r"model\.layers\.0"):
        client.submit(prune, options).result()


def test_a_plan_fetches_the_config_alone(
    hub: hubs.Hub, client: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """What a collection would take is known before the weights are downloaded for it."""
    hub.commit("models/someone/unseen", save_tiny("llama", tmp_path / "unseen", seed=3))
    config = CollectConfig(model="someone/unseen", store=tmp_path / "store", seq_len=12)
    planned = client.submit(plan, config).result()
    assert planned.num_parameters > 0
    assert hub.downloads("models/someone/unseen") == {"config.json"}
    assert not config.store.exists()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("someone/unheard-of", ("Repository Not Found",)),
        ("unheard-of", ("Repository Not Found",)),
        ("not a name!", ("Hub id",)),
        ("someone/nothing", ("config.json",)),
        ("someone/pickled", ("model.safetensors",)),
        ("someone/gated", ("gated",)),
    ],
)
def test_a_model_that_cannot_be_had_is_the_users_mistake(
    hub: hubs.Hub, client: ProcessPoolExecutor, tmp_path: Path, name: str, parts: tuple[str, ...]
) -> None:
    """One line, and exit code 2; a pickle is not even fetched."""
    config = CollectConfig(model=name, store=tmp_path / "store")
    with pytest.raises(InputError) as caught:
        client.submit(collected, config).result()
    assert_one_line(caught.value, name, *parts)
    code, stderr = client.submit(pipe, "collect-grads", name, str(tmp_path / "store")).result()
    assert (code, len(stderr.strip().splitlines())) == (2, 1)
    assert list(tmp_path.iterdir()) == []
    assert not any("pytorch_model.bin" in line for line in hub.requests)


def test_a_store_on_the_hub_prunes_as_the_local_one(
    hub: hubs.Hub, client: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """`hf://` reads a store that was published as a dataset; the output's bytes are the same."""
    model = save_tiny("llama", tmp_path / "model")
    write_rows(tmp_path / "text.jsonl", OWN_TRAIN)
    config = CollectConfig(
        model=str(model),
        store=tmp_path / "store",
        data=DataConfig(name=str(tmp_path / "text.jsonl")),
        num_samples=2,
        seq_len=8,
        statistics=("grad_l1", "act_l2"),
    )
    collect(config)
    hub.commit("datasets/someone/store", tmp_path / "store")
    outputs = []
    for name, store in (("a", str(tmp_path / "store")), ("b", "hf://datasets/someone/store")):
        options = PruneConfig(model=str(model), store=store, out=tmp_path / name, include=("mlp",))
        (result,) = client.submit(prune, options).result()
        outputs.append({p.name: p.read_bytes() for p in result.folder.iterdir()})
    assert outputs[0] == outputs[1]
    unheard = dataclasses.replace(options, store="hf://datasets/someone/unheard-of")
    with pytest.raises(InputError) as caught:
        client.submit(prune, unheard).result()
    assert_one_line(caught.value, "hf://datasets/someone/unheard-of")


# Without the Hub.


def test_what_was_fetched_serves_offline(
    hub: hubs.Hub, client: ProcessPoolExecutor, cache: Path, tmp_path: Path
) -> None:
    """With HF_HUB_OFFLINE the cache gives the same windows and commits, or one line."""
    chosen = [DataConfig(name="c4"), DataConfig(name="wikitext2"), DataConfig(name="someone/kept")]
    repo = "datasets/someone/kept"
    kept = hub.commit(repo, hub.resolve("datasets/someone/texts", "main")[1])
    online = [client.submit(calibration, data, 12, 0).result() for data in chosen]
    newer = hub.commit(repo, tmp_path)  # never fetched
    model = client.submit(located, "someone/tiny").result()
    with hubs.client(UNREACHABLE, cache, offline=True) as process:
        for data, samples in zip(chosen, online, strict=True):
            assert process.submit(calibration, data, 12, 0).result().spec == samples.spec
        for revision in (newer, "main"):
            pinned = DataConfig(name="someone/kept", revision=revision)
            with pytest.raises(InputError) as caught:
                process.submit(calibration, pinned, 12, 0).result()
            assert_one_line(caught.value, "someone/kept", revision, kept)
        with pytest.raises(InputError) as caught:
            process.submit(calibration, DataConfig(name="someone/unheard-of"), 12, 0).result()
        assert_one_line(caught.value, "someone/unheard-of")
        assert process.submit(located, "someone/tiny").result() == model
        with pytest.raises(InputError) as caught:
            process.submit(located, "someone/unheard-of").result()
        assert_one_line(caught.value, "someone/unheard-of", "HF_HUB_OFFLINE")


def test_a_hub_that_cannot_be_reached_is_named(
    client: ProcessPoolExecutor, cache: Path, tmp_path: Path
) -> None:
    """Presets and models that were fetched serve; anything else is one line."""
    preset = DataConfig(name="c4")
    samples = client.submit(calibration, preset, 12, 0).result()
    model = client.submit(located, "someone/tiny").result()
    with hubs.client(UNREACHABLE, cache) as process:
        assert process.submit(calibration, preset, 12, 0).result().spec == samples.spec
        assert process.submit(located, "someone/tiny").result() == model
        with pytest.raises(InputError) as caught:
            process.submit(calibration, DataConfig(name="someone/texts"), 12, 0).result()
        assert_one_line(caught.value, "someone/texts", "refused")
        words = ("collect-grads", "someone/unheard-of", str(tmp_path / "store"))
        code, stderr = process.submit(pipe, *words).result()
        assert (code, len(stderr.strip().splitlines())) == (2, 1)
        assert "refused" in stderr
