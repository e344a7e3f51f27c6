"""Pruned checkpoints on the Hub: the card's metadata, what was measured, and the upload."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradpipe import DataConfig, EvalConfig, evaluate
from tests.support import hub as hubs
from tests.support.cases import files_of
from tests.support.hub_content import pipe
from tests.support.models import save_tiny
from tests.support.texts import write_text
from tests.support.workplace import Refused, edit_weights

TEXT = ("--seq-len", "16", "--max-windows", "2", "--dataset")


def _sign_in() -> None:
    import os  # noqa: PLC0415 (in the other process)

    os.environ["HF_TOKEN"] = "hf_a_token_of_no_one"


def metadata(folder: Path) -> dict[str, Any]:
    """What the Hub would read of a card."""
    _, head, _ = (folder / "README.md").read_text().split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


@pytest.fixture
def pushing(hub: hubs.Hub, client: ProcessPoolExecutor, tmp_path: Path) -> Iterator[Path]:
    """A folder with a text; on the Hub a model, `someone/tiny`, whose store is in the folder."""
    client.submit(_sign_in).result()
    hub.commit("models/someone/tiny", save_tiny("llama", tmp_path / "model"))
    write_text(tmp_path / "text.txt")
    words = ("--num-samples", "2", "--seq-len", "16", "--dataset", str(tmp_path / "text.txt"))
    code, said = client.submit(
        pipe, "collect-grads", "someone/tiny", str(tmp_path / "store"), *words
    ).result()
    assert code == 0, said
    yield tmp_path
    shutil.rmtree(tmp_path / "store")


def run(client: ProcessPoolExecutor, *words: object) -> str:
    """What a command says that must succeed."""
    code, said = client.submit(pipe, *map(str, words)).result()
    assert code == 0, said
    return str(said)


def test_a_pruned_checkpoint_goes_to_the_hub_with_what_was_measured(
    pushing: Path, hub: hubs.Hub, client: ProcessPoolExecutor
) -> None:
    """Every file, the model that it was made from, and after an evaluation its figures."""
    out, repo = pushing / "out", "models/me/pruned"
    run(
        client,
        *("prune", "someone/tiny", pushing / "store", out, "--method", "wanda"),
        *("--push-to-hub", "me/pruned", "--private"),
    )
    assert files_of(hub.resolve(repo, "main")[1]) == files_of(out)
    assert repo in hub.private
    run(client, "verify", "me/pruned", "--base", "someone/tiny")
    first = metadata(out)
    assert first["base_model"] == "someone/tiny"
    assert "model-index" not in first

    text = pushing / "text.txt"
    words = (*TEXT, text, "--card", "--push-to-hub", "me/pruned")
    for _ in range(2):  # measured again, it is said once
        run(client, "eval", out, "--compare", "someone/tiny", *words)
    assert files_of(hub.resolve(repo, "main")[1]) == files_of(out)
    [entry] = metadata(out)["model-index"]
    metrics = {x["type"]: x["value"] for result in entry["results"] for x in result["metrics"]}
    assert metrics.keys() == {"perplexity", "kl_divergence"}
    data = DataConfig(name=str(text))
    own = evaluate(EvalConfig(model=str(out), data=data, seq_len=16, max_windows=2))
    assert metrics["perplexity"] == own.perplexity
    names = {x["type"]: x["name"] for result in entry["results"] for x in result["metrics"]}
    assert names["perplexity"] == "perplexity, 2 windows of 16 tokens"
    assert metadata(out)["base_model"] == "someone/tiny"
    assert (out / "README.md").read_text().count("# someone/tiny, pruned") == 1

    code, said = client.submit(pipe, "eval", "me/pruned", *map(str, words)).result()
    assert code == 2  # what is there is a copy in a cache
    assert "--card: me/pruned has no pruning.json, expected a folder" in said


def test_each_of_several_targets_has_a_repository(
    pushing: Path, hub: hubs.Hub, client: ProcessPoolExecutor
) -> None:
    """Named by its label."""
    words = ("--sparsity", "0.5", "--pattern", "2:4", "--push-to-hub", "me/tiny")
    run(client, "prune", "someone/tiny", pushing / "store", pushing / "out", *words)
    for label in ("s0.50", "2-4"):
        there = files_of(hub.resolve(f"models/me/tiny-{label}", "main")[1])
        assert there == files_of(pushing / "out" / label)


def test_what_cannot_be_pushed_is_refused_before_the_work(refused: Refused) -> None:
    """No repository's name, nobody logged in, nothing to push."""
    prune = "prune model store new --method wanda"
    refused(f"{prune} --push-to-hub nobody", says=("expected OWNER/NAME",))
    refused(f"{prune} --push-to-hub me/../you", says=("expected OWNER/NAME",))
    refused(f"{prune} --push-to-hub me/pruned", says=("no token", "hf auth login"))
    refused(f"{prune} --private", says=("--push-to-hub",))


def test_results_go_into_cards_of_pruned_checkpoints_alone(refused: Refused) -> None:
    """Another's README is not ours to write."""
    measured = "eval model --dataset text.txt --seq-len 16 --max-windows 2 --card"
    refused(measured, says=("--card", "has no pruning.json"))


def test_a_perplexity_beyond_a_float_is_no_figure_of_a_card(
    pushing: Path, client: ProcessPoolExecutor
) -> None:
    """The Hub has no infinity."""
    out = pushing / "out"
    run(client, "prune", "someone/tiny", pushing / "store", out, "--method", "magnitude")
    edit_weights(out, lambda x: x["model.norm.weight"].mul_(1e5))
    run(client, "eval", out, *TEXT, pushing / "text.txt", "--card")
    assert "model-index" not in metadata(out)
