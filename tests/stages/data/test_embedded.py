"""The shipped model, the text it comes with, and the script that trains others like it."""

import importlib.util
import json
import math
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradpipe.errors import InputError
from gradpipe.stages.checkpoint.place import EMBEDDED_MODEL
from gradpipe.stages.data.stdlib import DOCUMENT_SEPARATOR, heldout_modules, stdlib_documents

SCRIPT = Path(__file__).parents[3] / "scripts" / "train_tiny_model.py"
TINY = [
    "--steps=40",
    "--hidden=32",
    "--blocks=1",
    "--heads=2",
    "--kv-heads=1",
    "--intermediate=64",
    "--vocab=512",
    "--seq-len=64",
    "--batch-size=16",
]


def _heldout_windows(model: Path, count: int, seq_len: int) -> torch.Tensor:
    """Return the first held-out windows (W, T) in the model's tokens."""
    text = DOCUMENT_SEPARATOR.join(text for _, text in stdlib_documents("heldout"))
    ids = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    return torch.tensor(ids[: count * seq_len]).view(count, seq_len)


def _perplexity(model: Path, windows_WT: torch.Tensor) -> float:
    opened = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        return math.exp(opened(input_ids=windows_WT, labels=windows_WT).loss)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The training script, imported instead of run."""
    spec = importlib.util.spec_from_file_location("train_tiny_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred files of real text; the names alone decide which are held out."""
    folder = tmp_path_factory.mktemp("text")
    for number, (_, text) in enumerate(stdlib_documents("train")[:100]):
        (folder / f"{number}.txt").write_text(text[:5000], encoding="utf-8")
    return folder


def test_the_splits_share_no_file() -> None:
    """No file is calibrated on and evaluated on, and neither half is empty."""
    train, heldout = (dict(stdlib_documents(split)) for split in ("train", "heldout"))
    assert heldout
    assert len(train) > 10 * len(heldout)
    assert not train.keys() & heldout.keys()
    assert heldout.keys() <= set(heldout_modules())


def test_the_order_is_fixed() -> None:
    """Two readings give the same documents in the same order."""
    assert stdlib_documents("train") == stdlib_documents("train")
    assert stdlib_documents("heldout") == stdlib_documents("heldout")


def test_excluded_and_undecodable_files_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test suites, codecs and installed packages are no text of ours; Latin-1 is skipped."""
    for name in ("a.py", "b/c.py", "random.py", "test/d.py", "b/tests/e.py", "encodings/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert sorted(stdlib_documents("train")) == [("a.py", "# a.py\n"), ("b/c.py", "# b/c.py\n")]
    assert stdlib_documents("heldout") == [("random.py", "# random.py\n")]


def test_a_python_without_sources_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the standard library is zipped or frozen, the error says where it was looked for."""
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        stdlib_documents("train")


def test_the_embedded_model_has_learnt() -> None:
    """It opens from the package and predicts held-out text as a trained model does."""
    assert _perplexity(EMBEDDED_MODEL, _heldout_windows(EMBEDDED_MODEL, 24, 256)) < 30


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="the text of CPython 3.11.7")
def test_the_heldout_text_is_the_trainings_own() -> None:
    """On the version it was trained with, the held-out tokens come out as they were."""
    text = DOCUMENT_SEPARATOR.join(text for _, text in stdlib_documents("heldout"))
    assert len(AutoTokenizer.from_pretrained(EMBEDDED_MODEL)(text)["input_ids"]) == 141_907


def test_a_short_training_learns_and_opens(text_folder: Path, tmp_path: Path) -> None:
    """The script's directory opens by `from_pretrained`, far below where it started."""
    out = tmp_path / "model"
    command = [sys.executable, str(SCRIPT), str(out), f"--text={text_folder}", *TINY]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(out)
    perplexities = [float(x) for x in re.findall(r"perplexity ([\d.]+)", done.stderr)]
    assert perplexities[-1] < perplexities[0] / 2
    assert _perplexity(out, _heldout_windows(out, 8, 64)) < perplexities[0] / 2
    assert not list(tmp_path.glob("*.partial"))


def test_training_is_deterministic(script: ModuleType) -> None:
    """The seed fixes every bit of the weights; another seed gives others."""

    def trained(seed: int) -> dict[str, torch.Tensor]:
        size = script.ModelSize(hidden=16, blocks=1, intermediate=16, vocab=258)
        recipe = script.Recipe(steps=5, seed=seed, seq_len=16, batch_size=4)
        ids_S = torch.arange(1000) % 258
        model = script.build_model(size, recipe)
        script.train(model, ids_S, script.windows(ids_S, 16), recipe)
        weights: dict[str, torch.Tensor] = model.state_dict()
        return weights

    first, again, other = trained(0), trained(0), trained(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_learning_rate_follows_the_recipe(script: ModuleType) -> None:
    """Fifty steps up to 4e-3, then straight down to a tenth of it."""
    rates = [script.learning_rate(step, 1050) for step in range(1050)]
    assert rates[0] == pytest.approx(4e-3 / 50)
    assert max(rates) == rates[50] == rates[49] == 4e-3
    assert rates[550] == pytest.approx(2.2e-3)
    assert rates[-1] == pytest.approx(4e-4, rel=0.01)


def test_the_two_halves_of_a_text_are_kept(
    script: ModuleType, text_folder: Path, tmp_path: Path
) -> None:
    """What was trained on, to calibrate with, and what was held out, to evaluate on."""
    script.write_texts(tmp_path / "texts", script.folder_corpus(text_folder))
    halves = {}
    for half in ("train", "heldout"):
        lines = (tmp_path / "texts" / f"{half}.jsonl").read_text(encoding="utf-8").splitlines()
        halves[half] = [json.loads(line)["text"] for line in lines]
        kept = [
            path.read_text(encoding="utf-8")
            for path in sorted(text_folder.iterdir())
            if script.is_heldout(path.relative_to(text_folder)) == (half == "heldout")
        ]
        assert halves[half] == kept
    assert min(map(len, halves.values())) > 0


def test_mistakes_are_named(script: ModuleType, text_folder: Path, tmp_path: Path) -> None:
    """Sizes that don't divide, a taken path and too little text are errors before training."""
    with pytest.raises(InputError, match=r"--hidden 100 .* --heads"):
        script.ModelSize(hidden=100, heads=3)
    with pytest.raises(InputError, match="--kv-heads 3"):
        script.ModelSize(hidden=128, heads=4, kv_heads=3)
    with pytest.raises(InputError, match="exists already"):
        script.run(tmp_path, text_folder, None, script.SIZE, script.RECIPE)
    (tmp_path / "only.txt").write_text("a few words", encoding="utf-8")
    with pytest.raises(InputError, match="split the text into more files"):
        script.folder_corpus(tmp_path)
