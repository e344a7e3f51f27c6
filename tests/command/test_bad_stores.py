"""Stores and outputs: what they may replace, which store fits a model, what is damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import zarr

from tests.support.workplace import COLLECT, IMPORT, KEY, LAYER, OBJECT, PRUNE, Refused, succeed

# ---- destinations ----


@pytest.mark.parametrize("command", [COLLECT, f"{IMPORT} --l1 l1.pth"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("store", ("store store exists and is complete", "another name or --overwrite")),
        ("foreign", ("store foreign holds files of another kind", "another name")),
        ("foreign --overwrite", ("store foreign holds files of another kind", "another name")),
        ("model --overwrite", ("store model holds model, which is read", "another name")),
        ("text.txt", ("store text.txt is a file", "a folder to create")),
        ("text.txt --overwrite", ("store text.txt is a file", "a folder to create")),
        ("text.txt/store", ("text.txt is a file", "expected a folder")),
        ("s3://bucket/store", ("is a URL", "expected a local folder")),
    ],
)
def test_a_store_replaces_nothing_but_a_store(
    refused: Refused, command: str, options: str, says: tuple[str, ...]
) -> None:
    """And a store only with --overwrite."""
    refused(command.replace("new", options, 1), says=says)


def test_another_zarr_group_is_not_an_unfinished_store(refused: Refused, tmp_path: Path) -> None:
    """Somebody's own Zarr data, and what only has the name of metadata, stay."""
    zarr.create_group(str(tmp_path / "group")).create_array("a", shape=(2,), dtype="f4")
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "zarr.json").write_text("junk")
    for name in ("group", "junk"):
        command = COLLECT.replace("new", str(tmp_path / name)) + " --overwrite"
        refused(command, says=(f"store {tmp_path / name} holds files of another kind",))


def test_a_store_never_replaces_what_it_is_made_from(
    refused: Refused, workplace: Path, tmp_path: Path
) -> None:
    """A model, a text, gradients or activations inside the store to be replaced are not lost."""
    store = tmp_path / "store"
    shutil.copytree(workplace / "store", store)
    shutil.copytree(workplace / "model", store / "model")
    shutil.copy(workplace / "text.txt", store)
    shutil.copy(workplace / "l1.pth", store)
    collect = COLLECT.replace("new", str(store)) + " --overwrite"
    bring_in = IMPORT.replace("new", str(store)) + " --overwrite --l1"
    refused(collect.replace("model", str(store / "model"), 1), says=(f"holds {store / 'model'}",))
    refused(collect, "--dataset", store / "text.txt", says=(f"holds {store / 'text.txt'}",))
    refused(bring_in, store / "l1.pth", says=(f"holds {store / 'l1.pth'}",))
    for url in (store, f"file://{store}"):
        refused(bring_in, "l1.pth", "--activations", url, says=(f"holds {store}",))


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("foreign", ("OUT foreign exists", "another name or --overwrite")),
        ("text.txt", ("OUT text.txt exists", "another name or --overwrite")),
        ("text.txt --overwrite", ("OUT text.txt is a file", "a folder to create or replace")),
        ("foreign --overwrite", ("OUT foreign holds files that no pruning wrote", "another name")),
        ("text.txt/new", ("text.txt is a file", "expected a folder")),
        ("s3://bucket/new", ("is a URL", "expected a local folder")),
    ],
)
def test_an_output_that_exists_is_kept(refused: Refused, out: str, says: tuple[str, ...]) -> None:
    """Nothing is replaced unasked, and nothing but a folder ever is."""
    refused(PRUNE.replace("new", out), says=says)


@pytest.mark.parametrize("store", ["store", "{}/store", "file://{}/store"])
@pytest.mark.parametrize(
    "out",
    ["model", "model/new", "model/../model", "store", "store/new", "store/layers", ".", "..", "/"],
)
def test_an_output_never_touches_what_it_is_made_from(
    refused: Refused, workplace: Path, store: str, out: str
) -> None:
    """OUT as model or store, in one or around one: refused, also with --overwrite."""
    store = store.format(workplace)
    refused(f"prune model {store} {out} --overwrite", says=(f"OUT {Path(out)} and", "another OUT"))


def test_a_link_to_the_model_is_the_model(
    refused: Refused, workplace: Path, tmp_path: Path
) -> None:
    """Another name for the same folder does not get it replaced."""
    (tmp_path / "link").symlink_to(workplace / "model")
    refused(PRUNE.replace("new", str(tmp_path / "link")), "--overwrite", says=("another OUT",))


# ---- stores that do not fit ----


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("other-names", ("store is of another model (model)", f"other-names has no {KEY}")),
        ("other-shapes", (f"layer {LAYER} is (32, 32) there, (64, 32) in other-shapes",)),
        ("other-weights", ("layer model.layers.0.", "collect again, or --allow-mismatch")),
    ],
)
def test_a_store_of_another_model_is_refused(
    refused: Refused, model: str, says: tuple[str, ...]
) -> None:
    """By the names of its layers, by their shapes, and by the bytes of their weights."""
    refused(f"prune {model} store new", says=says)
    refused(f"prune {model} store new/in/folders", says=says)


def test_a_mismatch_that_is_allowed_is_recorded(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pruning.json` names the layers that were not measured, and gives the command."""
    monkeypatch.chdir(workplace)
    for model, mismatched in (("other-weights", 14), ("model", 0)):
        out = tmp_path / model
        succeed(f"prune {model} store {out} --allow-mismatch", monkeypatch)
        report = json.loads((out / "pruning.json").read_text())
        assert len(report["mismatched_layers"]) == mismatched
        assert set(report["mismatched_layers"]) <= set(report["layers"])
        assert "--allow-mismatch" in report["command"]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (
            "prune model store new --grad-norm l2",
            ("store store lacks grad_l2", "gblm", "--statistics grad_l1,act_l2,grad_l2"),
        ),
        (
            "prune model {}/no-activations new --method wanda",
            ("lacks act_l2", "wanda needs", "--statistics grad_l1,act_l2"),
        ),
        (
            "prune model store new --include lm_head",
            ("lacks grad_l1 of layer lm_head", "--statistics grad_l1,act_l2 --include lm_head"),
        ),
    ],
)
def test_a_statistic_that_is_missing_is_asked_for_by_its_flag(
    refused: Refused, stores: Path, command: str, says: tuple[str, ...]
) -> None:
    """The line holds the options that would have collected it."""
    refused(command.format(stores), says=says)


@pytest.mark.parametrize("command", ["store info {}", "store verify {}", "prune model {} new"])
def test_what_is_no_store_is_told_from_a_damaged_one(refused: Refused, command: str) -> None:
    """Nothing there, a folder of other files, a file, or a URL of no known kind: exit 2."""
    refused(command.format("missing"), says=("no store at missing", "collect-grads"))
    for name in ("empty", "foreign", "model", "text.txt"):
        refused(command.format(name), says=(f"{name} is not a gradient store", "commit.json"))
    refused(command.format("nonesuch://x"), says=("cannot open store nonesuch://x",))


# ---- damaged stores ----


@pytest.mark.parametrize("command", ["store info {}", "store verify {}", "prune model {} new"])
def test_a_store_without_its_commit_record_is_incomplete(
    refused: Refused, workplace: Path, tmp_path: Path, command: str
) -> None:
    """However much of it is there; the line says which command finishes it."""
    store = tmp_path / "store"
    shutil.copytree(workplace / "store", store)
    (store / "commit.json").unlink()
    says = (f"store {store} is incomplete", "no commit.json", "collect-grads again")
    refused(command.format(store), code=3, says=says)


def _flip(share: float) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(share * (len(data) - 1))] ^= 1
        path.write_bytes(data)

    return flip


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


_DAMAGES = [_flip(0), _flip(0.5), _flip(1), _halve, _lengthen, _empty]


@pytest.mark.parametrize(
    "damage", _DAMAGES, ids=["first", "middle", "last", "halved", "longer", "empty"]
)
@pytest.mark.parametrize(
    "key", ["zarr.json", "commit.json", f"layers/{LAYER}/grad_l1/codes/zarr.json", OBJECT]
)
def test_a_damaged_object_is_named(
    refused: Refused,
    workplace: Path,
    tmp_path: Path,
    key: str,
    damage: Callable[[Path], object],
) -> None:
    """A bit, the end, all of it: verifying and pruning exit 3, and no output is left."""
    store = tmp_path / "store"
    shutil.copytree(workplace / "store", store)
    damage(store / key)
    for command in ("store verify {}", "prune model {} new", "prune model {} new/in/folders"):
        refused(command.format(store), code=3, says=(f"store {store}: object {key} is damaged",))


@pytest.mark.parametrize("key", ["zarr.json", f"layers/{LAYER}/act_l2/zarr.json", OBJECT])
def test_a_deleted_object_is_named(
    refused: Refused, workplace: Path, tmp_path: Path, key: str
) -> None:
    """A chunk that is gone would read as zeros without an error: here it is one."""
    store = tmp_path / "store"
    shutil.copytree(workplace / "store", store)
    (store / key).unlink()
    for command in ("store verify {}", "prune model {} new"):
        refused(command.format(store), code=3, says=(f"object {key} is missing", "restore"))


@pytest.mark.parametrize(
    "key", ["calibration/input_ids/c/0/0", "calibration/sources/zarr.json", "layers/zarr.json"]
)
def test_verify_reads_also_what_pruning_does_not(
    refused: Refused, workplace: Path, tmp_path: Path, key: str
) -> None:
    """Every object is checked, whoever needs it."""
    for name, damage in (("flipped", _flip(0.5)), ("deleted", Path.unlink)):
        shutil.copytree(workplace / "store", tmp_path / name)
        damage(tmp_path / name / key)
        refused("store verify", tmp_path / name, code=3, says=(f"object {key} is",))
