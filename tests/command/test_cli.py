"""The command line from end to end: what goes in, what comes out, and on which stream.

Most commands run in this process, in a folder of their own; a few as the installed `pipe`, whose
real stdout and stderr are looked at.
"""

import gzip
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gradpipe import GradientStore, cli
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.model.load import load_tokenizer
from tests.support.cases import written
from tests.support.models import VOCAB_SIZE, random_ids, tiny_model
from tests.support.reference import reference_perplexity
from tests.support.texts import SENTENCE, write_text
from tests.support.workplace import Pipe

PIPE = Path(sys.executable).with_name("pipe")
COLLECT = "collect-grads model store --dataset text.txt --seq-len 16 --num-samples 4"
EVAL = "eval model --dataset text.txt --seq-len 16"
SAMPLES, ALPHA = 4, 100.0


def weights(folder: str) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of one file."""
    return load_file(Path(folder) / "model.safetensors")


# ---- collect-grads ----


def _write_text(path: Path) -> None:
    write_text(path / "a.txt")


def _write_rows(path: Path) -> None:
    (path / "a.jsonl").write_text(json.dumps({"text": SENTENCE * 20}) + "\n\n")


def _write_rows_under_another_name(path: Path) -> None:
    (path / "a.jsonl").write_text(json.dumps({"body": SENTENCE * 20, "text": 1}) + "\n")


def _write_compressed_rows(path: Path) -> None:
    (path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": SENTENCE * 20}).encode()))


def _write_table(path: Path) -> None:
    pq.write_table(pa.table({"n": [1], "text": [SENTENCE * 20]}), path / "a.parquet")


def _write_text_with_mark(path: Path) -> None:
    (path / "a.txt").write_text(Path("text.txt").read_text(), encoding="utf-8-sig")


def _write_odd_names(path: Path) -> None:
    rows = json.dumps({"text": SENTENCE * 20})
    (path / "a*[1]::b #?.jsonl").write_text(rows)


def _write_folders(path: Path) -> None:
    (path / "a" / "b.txt").mkdir(parents=True)
    (path / "a" / "b.txt" / "c.txt").write_text(SENTENCE * 20)
    (path / "a" / "notes.md").write_text("not a text that is read")


@pytest.mark.parametrize(
    ("write", "options"),
    [
        (_write_text, ""),
        (_write_rows, ""),
        (_write_rows_under_another_name, " --text-column body"),
        (_write_compressed_rows, ""),
        (_write_table, ""),
        (_write_text_with_mark, ""),
        (_write_odd_names, ""),
        (_write_folders, ""),
    ],
)
def test_the_same_text_in_any_form_gives_the_same_samples(
    pipe: Pipe, tmp_path: Path, write: Callable[[Path], None], options: str
) -> None:
    """A text, rows, compressed rows, a table and a folder of them differ in form only."""
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    found = next((tmp_path / "data").iterdir())
    act_l2 = " --statistics act_l2"
    pipe(COLLECT + act_l2)
    pipe(
        COLLECT.replace("text.txt", shlex.quote(str(found))).replace("store", "b")
        + act_l2
        + options
    )
    one, other = (GradientStore.open(name).spec.samples.digest for name in ("store", "b"))
    assert one == other


def test_a_file_of_tokens_is_taken_as_it_is(pipe: Pipe) -> None:
    """Rows are windows, one long row is cut up; both stages and evaluation read them."""
    model, windows = tiny_model("llama"), random_ids(VOCAB_SIZE, 6, 16, seed=4)
    np.save("rows.npy", windows.numpy().astype(np.int16))
    np.save("row.npy", windows.flatten().numpy())
    for name in ("rows", "row"):
        pipe(f"collect-grads model {name} --dataset {name}.npy --seq-len 16 --num-samples 4")
        store = GradientStore.open(name)
        assert (store.input_ids() == windows[:4].numpy()).all()
        assert store.spec.samples.dataset == f"{name}.npy"
        document = json.loads(pipe(f"eval model --dataset {name}.npy --seq-len 16 --json -"))
        expected = reference_perplexity(model, windows.flatten(), 16)
        assert document["perplexity"] == pytest.approx(expected, rel=1e-5)
        assert document["num_windows"] == 6


def test_the_recipe_is_one_flag_in_both_stages(pipe: Pipe) -> None:
    """It stands for the options that it names: the same weights as with those written out."""
    pipe(f"{COLLECT} --recipe best")
    assert {"hessian", "grad_cov", "grad_l2"} <= set(GradientStore.open("store").spec.statistics)
    pipe("prune model store one --recipe best --sparsity 0.6")
    pipe(
        "prune model store other --method alps --curvature kfac --allocation sensitivity "
        "--sparsity 0.6"
    )
    one, other = (load_file(f"{name}/model.safetensors") for name in ("one", "other"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    report = json.loads(Path("one/pruning.json").read_text())
    assert report["method"] == "alps"
    pipe("prune model store third --recipe best --allocation uniform --sparsity 0.6")
    third = json.loads(Path("third/pruning.json").read_text())
    assert third["allocation"] == "uniform"  # what is asked for by name comes first
    pipe("prune model store fourth --recipe best --score abs(W)*X")
    fourth = json.loads(Path("fourth/pruning.json").read_text())
    assert (fourth["method"], fourth["allocation"]) == ("abs(W)*X", "sensitivity")


def test_a_store_is_described_on_stdout(pipe: Pipe) -> None:
    """Model, samples, layers and sizes, in a table; the same as `store info` shows."""
    out = pipe(COLLECT)
    for words in ("LlamaForCausalLM", "4 x 16 tokens of text.txt", "14, 16,896 weights", "act_l2"):
        assert words in out
    assert pipe("store info store") == out


def test_overwrite_collects_anew(pipe: Pipe) -> None:
    """The store that was there gives way to the one that is asked for."""
    pipe(COLLECT)
    pipe(f"{COLLECT} --overwrite --seed 1 --statistics act_l2")
    spec = GradientStore.open("store").spec
    assert (spec.statistics, spec.samples.seed) == (("act_l2",), 1)


# ---- prune ----


def test_several_targets_have_a_folder_each(pipe: Pipe) -> None:
    """Two sparsities and a pattern: three checkpoints that open, and a column for each."""
    pipe(COLLECT)
    out = pipe("prune model store pruned --sparsity 0.5 --sparsity 0.6 --pattern 2:4")
    assert sorted(path.name for path in Path("pruned").iterdir()) == ["2-4", "s0.50", "s0.60"]
    dense = weights("model")
    for label, share in (("s0.50", 0.5), ("s0.60", 0.6), ("2-4", 0.5)):
        assert f"{label} " in out
        model = AutoModelForCausalLM.from_pretrained(f"pruned/{label}")
        for key, weight in model.state_dict().items():
            if ".layers." not in key or weight.ndim != 2:
                assert torch.equal(weight, dense[key])
                continue
            size = weight.shape[1]
            zeros = (weight == 0).view(-1, 4 if label == "2-4" else size).sum(dim=1)
            assert set(zeros.tolist()) == {2 if label == "2-4" else math.floor(share * size + 1e-9)}
    assert f"{0.5:.4f}" in out


def test_one_target_is_the_folder_itself(pipe: Pipe) -> None:
    """Half of the weights by default, and the report says by which command."""
    pipe(COLLECT)
    out = pipe("prune model store pruned --method wanda --group layer --exclude down_proj")
    report = json.loads(Path("pruned/pruning.json").read_text())
    assert report["achieved_sparsity"] == 0.5
    assert not any("down_proj" in name for name in report["layers"])
    assert "--exclude down_proj" in report["command"]
    assert "mlp.up_proj" in out


# ---- eval ----


def test_eval_gives_the_perplexity_of_a_plain_loop(pipe: Pipe) -> None:
    """As a line, as JSON on stdout, and as the same JSON in a file with nothing on stdout."""
    document = json.loads(pipe(f"{EVAL} --json -"))
    assert pipe(f"{EVAL} --json metrics.json") == ""
    assert json.loads(Path("metrics.json").read_text()) == document
    model = tiny_model("llama")
    assert document["dataset"] == "text.txt"
    assert document["num_tokens"] == document["num_windows"] * 16
    line = pipe(EVAL)
    assert line.startswith(f"perplexity {document['perplexity']:.4f}  (text.txt,")
    assert line.count("\n") == 1
    ids = torch.tensor(_token_ids())
    assert document["perplexity"] == pytest.approx(reference_perplexity(model, ids, 16), rel=1e-5)


def _token_ids() -> list[int]:
    """The text as the model's tokenizer reads it."""
    tokenizer = load_tokenizer(Checkpoint.open("model"))
    ids: list[int] = tokenizer(Path("text.txt").read_text())["input_ids"]
    return ids


def test_eval_takes_only_as_many_windows_as_asked(pipe: Pipe) -> None:
    """And the batch size changes the time, not the result."""
    one = json.loads(pipe(f"{EVAL} --max-windows 5 --json -"))
    five = json.loads(pipe(f"{EVAL} --max-windows 5 --batch-size 5 --json -"))
    assert one["num_windows"] == five["num_windows"] == 5
    assert one["perplexity"] == pytest.approx(five["perplexity"], rel=1e-5)


# ---- store ----


def test_store_info_is_a_document(pipe: Pipe) -> None:
    """`--json -` gives the store's own description, its digest and sizes, and nothing else."""
    pipe(COLLECT)
    document = json.loads(pipe("store info store --json -"))
    assert document["statistics"] == ["grad_l1", "grad_l2", "act_l2"]
    assert document["digest"] == GradientStore.open("store").digest
    assert set(document["bytes"]) == {"grad_l1", "grad_l2", "act_l2", "other"}
    assert pipe("store info store --json info.json") == ""
    assert json.loads(Path("info.json").read_text()) == document


def test_an_intact_store_verifies(pipe: Pipe) -> None:
    """By path or by URL; the line holds the digest that names its content."""
    pipe(COLLECT)
    line = f"complete and intact ({GradientStore.open('store').digest})\n"
    assert pipe("store verify store") == f"store: {line}"
    assert pipe(f"store verify file://{Path.cwd()}/store").endswith(line)


# ---- the embedded model and the standard library's text ----


def test_the_embedded_model_needs_nothing_from_outside(pipe: Pipe) -> None:
    """`embedded` and `stdlib` go through both stages and evaluation by their names."""
    pipe("collect-grads embedded store --dataset stdlib --seq-len 64 --num-samples 2")
    pipe("prune embedded store pruned --sparsity 0.5")
    evaluate = "--dataset stdlib --seq-len 64 --max-windows 8 --json -"
    dense, pruned = (json.loads(pipe(f"eval {m} {evaluate}")) for m in ("embedded", "pruned"))
    assert (dense["model"], dense["dataset"]) == ("embedded", "stdlib")
    assert (dense["split"], dense["dataset_config"]) == ("heldout", None)
    assert "(stdlib heldout, 8 windows" in pipe(
        "eval embedded " + evaluate.removesuffix("--json -")
    )
    assert dense["perplexity"] < pruned["perplexity"] < 10 * dense["perplexity"]
    report = json.loads(Path("pruned/pruning.json").read_text())
    assert report["model"] == "embedded"


# ---- as a process of its own ----


@pytest.mark.parametrize(
    ("command", "is_data"),
    [
        (COLLECT, lambda out: "gradient store store" in out),
        (f"{EVAL} --json -", lambda out: json.loads(out)["dataset"] == "text.txt"),
    ],
)
def test_stdout_holds_data_and_stderr_no_bars(
    tmp_path: Path, command: str, is_data: Callable[[str], bool]
) -> None:
    """Off a terminal neither our bars nor those of a library appear, and JSON stands alone."""
    written(tmp_path)
    done = subprocess.run(
        [PIPE, *shlex.split(command)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    said = [line for line in done.stderr.splitlines() if not line.startswith("schedule ")]
    assert said == []
    assert is_data(done.stdout)


@pytest.mark.parametrize(
    "command", ["", "collect-grads", "prune", "eval", "demo", "store", "store import-gblm"]
)
def test_every_command_explains_itself(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--help` is data: it goes to stdout, and exits 0."""
    monkeypatch.setattr(sys, "argv", ["pipe", *shlex.split(command), "--help"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    assert (stopped.value.code, err) == (0, "")
    assert "Usage: " in out
