"""Models and stores of the Hub, and no Hub at all: the real clients against one on this machine.

All of it runs in one other process, because the clients read where the Hub is when imported.
"""

import dataclasses
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from gradpipe import (
    CollectConfig,
    DataConfig,
    EvalConfig,
    InputError,
    PruneConfig,
    collect,
    evaluate,
    plan,
    prune,
)
from tests.support import hub as hubs
from tests.support.hub_content import (
    C4_COMMIT,
    OWN_TRAIN,
    UNREACHABLE,
    WIKITEXT_COMMIT,
    assert_one_line,
    calibration,
    collected,
    located,
    pipe,
    write_rows,
)
from tests.support.models import save_tiny

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
    listings = [x for x in hub.requests if "datasets/someone/store/tree" in x]
    assert len(listings) <= 3  # not one for each object
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
