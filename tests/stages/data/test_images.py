"""Labelled images: what is read as samples, what top-1 is, and what cannot be used."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageClassification

from gradpipe import (
    CollectConfig,
    DataConfig,
    EvalConfig,
    GradientStore,
    InputError,
    classify,
    collect,
    evaluate,
    plan,
)
from gradpipe.store.schema import SampleSpec
from tests.support import hub as hubs
from tests.support.cases import collecting
from tests.support.models import save_tiny
from tests.support.texts import write_text
from tests.support.vision import (
    CLASSES,
    FAMILIES,
    NUM_TOKENS,
    SIZE,
    image_table,
    save_classifier,
    tiny_classifier,
    write_images,
)
from tests.support.workplace import edit_config, run_pipe

ROOT = Path(__file__).parents[3]
NUM_SAMPLES = 7


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return str(request.param)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models, a folder of 12 images, and the same images as a table."""
    folder = tmp_path_factory.mktemp("vision")
    for family in FAMILIES:
        save_classifier(family, folder / family)
    write_images(folder / "images")
    image_table(folder / "images").to_parquet(folder / "images.parquet")
    return folder


def config(workplace: Path, store: Path, family: str = "vit", **changes: Any) -> CollectConfig:
    """A small run."""
    settings = {
        "model": str(workplace / family),
        "data": DataConfig(name=str(workplace / "images")),
        "num_samples": NUM_SAMPLES,
        "seq_len": None,
        "batch_size": 2,
    }
    return collecting(workplace, store, **{**settings, **changes})


@pytest.fixture(scope="module")
def store(workplace: Path, family: str, tmp_path_factory: pytest.TempPathFactory) -> GradientStore:
    """Of the family's model."""
    return collect(config(workplace, tmp_path_factory.mktemp(family) / "store", family))


def collected(run: CollectConfig) -> SampleSpec:
    """Write a store; what it says of its samples."""
    return collect(run).spec.samples


def pixels_of(workplace: Path, family: str) -> tuple[Tensor, Tensor]:
    """All images of the folder, in path order, and labels, by the model's own recipe in numpy."""
    files = sorted((workplace / "images").rglob("*.png"))
    settings = json.loads((workplace / family / "preprocessor_config.json").read_text())
    mean, std = (np.array(settings[name], np.float32) for name in ("image_mean", "image_std"))
    size, margin = settings["size"]["height"], (settings["size"]["height"] - SIZE) // 2
    resized = [
        np.asarray(Image.open(file).resize((size, size), settings["resample"]), np.float32)
        for file in files
    ]
    cropped = [x[margin : margin + SIZE, margin : margin + SIZE] for x in resized]
    scaled = [((x / 255 - mean) / std).transpose(2, 0, 1) for x in cropped]
    labels = [CLASSES.index(file.parent.name) for file in files]
    return torch.from_numpy(np.stack(scaled)), torch.tensor(labels)


# ---- collecting ----


def test_samples_are_the_images_as_the_model_takes_them(
    workplace: Path, family: str, store: GradientStore
) -> None:
    """A store has different images, their pixels and labels, and where they come from."""
    arrays, spec = store.calibration().arrays, store.spec
    pixels, labels = pixels_of(workplace, family)
    drawn = arrays["sources"][:, 0]
    assert len(set(drawn.tolist())) == NUM_SAMPLES
    got = arrays["pixel_values"].reshape(NUM_SAMPLES, 3, SIZE, SIZE)
    np.testing.assert_allclose(got, pixels[drawn], atol=1e-6)
    np.testing.assert_array_equal(arrays["labels"], labels[drawn])
    assert (spec.objective, spec.samples.sampling) == ("image-classification", "images")
    assert (spec.samples.seq_len, spec.samples.image_shape) == (NUM_TOKENS[family], (3, SIZE, SIZE))
    assert spec.command.startswith(f"pipe collect-grads {family} STORE --task image-classification")
    with pytest.raises(InputError, match="images"):
        store.input_ids()


def test_thin_and_grey_images_are_images(workplace: Path, tmp_path: Path) -> None:
    """Three rows of pixels are not three colours, and grey is one of the colours."""
    folder = write_images(tmp_path / "images", count=1)
    Image.new("RGB", (9, 3), (255, 0, 0)).save(folder / "circle" / "00.png")
    Image.new("L", (1, 1), 128).save(folder / "cross" / "00.png")
    run = config(workplace, tmp_path / "store", data=DataConfig(name=str(folder)), num_samples=3)
    arrays = collect(run).calibration().arrays
    pixels = arrays["pixel_values"][arrays["labels"].argsort()].reshape(3, 3, SIZE * SIZE)
    np.testing.assert_allclose(pixels[0], np.repeat([[1], [-1], [-1]], SIZE * SIZE, 1))
    np.testing.assert_allclose(pixels[1], 128 / 127.5 - 1, atol=1e-6)


def test_a_table_is_the_same_as_a_folder(workplace: Path, tmp_path: Path) -> None:
    """The same images in a parquet file give the same samples and sums."""
    folder = collect(config(workplace, tmp_path / "folder"))
    data = DataConfig(name=str(workplace / "images.parquet"))
    table = collect(config(workplace, tmp_path / "table", data=data))
    assert folder.spec.samples.digest == table.spec.samples.digest
    names = [store.spec.samples.dataset for store in (folder, table)]
    assert names == ["images", "images.parquet"]
    for layer in folder.spec.layers:
        np.testing.assert_array_equal(
            folder.read_norms(layer, "grad_l1"), table.read_norms(layer, "grad_l1")
        )


def test_data_sets_of_the_hub(workplace: Path, tmp_path: Path) -> None:
    """A repository of tables, or of files, gives what the folder does; its commit is recorded."""
    (tmp_path / "table" / "data").mkdir(parents=True)
    shutil.copy(workplace / "images.parquet", tmp_path / "table" / "data" / "train-0.parquet")
    shutil.copytree(workplace / "images", tmp_path / "files" / "train")
    expected = collect(config(workplace, tmp_path / "local")).spec.samples.digest
    with hubs.serve() as hub:
        commits = {
            f"me/{name}": hub.commit(f"datasets/me/{name}", tmp_path / name)
            for name in ("table", "files")
        }
        with hubs.client(hub.endpoint, tmp_path / "cache") as pool:
            for name, commit in commits.items():
                run = config(workplace, tmp_path / name, data=DataConfig(name=name))
                samples = pool.submit(collected, run).result()
                assert (samples.dataset, samples.revision) == (name, commit)
                assert samples.digest == expected


def test_a_plan_knows_images(workplace: Path, tmp_path: Path, family: str) -> None:
    """What it would take is told from the config alone; tokens are those that the blocks see."""
    run = config(workplace, tmp_path / "store", family, schedule="auto")
    planned = plan(replace(run, data=DataConfig(name="c4")))
    parameters = sum(p.numel() for p in tiny_classifier(family).parameters())
    assert planned.num_parameters == parameters
    assert planned.flops == 6 * parameters * NUM_SAMPLES * NUM_TOKENS[family]


# ---- evaluating ----


@pytest.mark.parametrize("data", ["images", "images.parquet"])
def test_top1_is_the_share_of_right_answers(workplace: Path, family: str, data: str) -> None:
    """Accuracy is that of transformers' model on pixels made by hand, in any batch."""
    model = AutoModelForImageClassification.from_pretrained(workplace / family)
    pixels, labels = pixels_of(workplace, family)
    expected = float((model(pixel_values=pixels).logits.argmax(-1) == labels).float().mean())
    run = EvalConfig(model=str(workplace / family), data=DataConfig(name=str(workplace / data)))
    for batch_size in (1, 5):
        got = classify(replace(run, batch_size=batch_size))
        assert got.top1 == pytest.approx(expected)
        assert got.num_images == len(labels)


def test_the_command_evaluates_images(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pipe eval` finds out what the model is for, and prints top-1, or writes it."""
    model, images = str(workplace / "vit"), str(workplace / "images")
    expected = classify(EvalConfig(model=model, data=DataConfig(name=images)))
    assert run_pipe(monkeypatch, "eval", model, "--dataset", images) == 0
    assert capsys.readouterr().out.startswith(f"top-1 {100 * expected.top1:.2f} %  (")
    arguments = ("--task", "image-classification", "--dataset", images, "--json", "-")
    assert run_pipe(monkeypatch, "eval", model, *arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["top1"], document["num_images"]) == (expected.top1, 12)


def test_class_names_decide_labels_or_else_their_order(workplace: Path, tmp_path: Path) -> None:
    """Folders with the model's names go by them; as many others go by their order."""
    reverse = {name: 2 - label for label, name in enumerate(CLASSES)}
    ids = {str(label): name for name, label in reverse.items()}
    edit_config(save_classifier("vit", tmp_path / "model"), label2id=reverse, id2label=ids)
    right = {"images": 0, "renamed": 0}
    write_images(tmp_path / "renamed", names=("a", "b", "c"))
    for name, folder in (("images", workplace / "images"), ("renamed", tmp_path / "renamed")):
        run = config(workplace, tmp_path / name / "store", model=str(tmp_path / "model"))
        store = collect(replace(run, data=DataConfig(name=str(folder))))
        arrays = store.calibration().arrays
        folders = arrays["sources"][:, 0] // 4  # four images each, in path order
        right[name] = int((arrays["labels"] == folders).sum())
        if name == "images":
            np.testing.assert_array_equal(arrays["labels"], 2 - folders)
    assert right["renamed"] == NUM_SAMPLES


# ---- the user's mistakes ----


@pytest.mark.parametrize("verb", ["collect-grads", "eval"])
@pytest.mark.parametrize(
    ("task", "model", "says"),
    [
        ("segmentation", "vit", "expected one of causal-lm, image-classification"),
        ("causal-lm", "vit", "is a ViTForImageClassification, not a causal language model"),
        ("image-classification", "llama", "is a LlamaForCausalLM, not an image classifier"),
    ],
)
def test_a_task_that_is_none_or_another_models_is_refused(
    workplace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    task: str,
    model: str,
    says: str,
) -> None:
    """One line that says what the model is, and exit code 2; nothing is written."""
    folder = save_tiny("llama", tmp_path / "llama") if model == "llama" else workplace / model
    capsys.readouterr()
    place = (str(tmp_path / "store"),) if verb == "collect-grads" else ()
    images = str(workplace / "images")
    assert (
        run_pipe(monkeypatch, verb, str(folder), *place, "--task", task, "--dataset", images) == 2
    )
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert says in error[0]
    assert not (tmp_path / "store").exists()


@pytest.fixture
def broken(workplace: Path, tmp_path: Path) -> dict[str, Path]:
    """Folders and tables that cannot be used, by what is wrong with them."""
    write_images(tmp_path / "two", names=("a", "b"))
    write_images(tmp_path / "other", names=("circle", "cross", "star"))
    write_images(tmp_path / "torn")
    torn = tmp_path / "torn" / "cross" / "01.png"
    torn.write_bytes(torn.read_bytes()[:100])
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no images")
    table = image_table(workplace / "images")
    table.remove_columns("label").to_parquet(tmp_path / "bare.parquet")
    features = table.features
    unlabelled = table.remove_columns("label").add_column("label", [-1] * 12)
    unlabelled.cast(features).to_parquet(tmp_path / "unlabelled.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    return {path.name: path for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("two", "has 2 classes (a, b), .* has 3 (circle, cross, square)"),
        ("other", "has 3 classes (circle, cross, star)"),
        ("torn", "cross/01.png is not an image that can be read"),
        ("empty", "expected one folder for each class"),
        ("text.txt", "expected a folder of images, or a .parquet file"),
        ("bare.parquet", "expected one column of images and one of class labels; it has image"),
        ("unlabelled.parquet", "row 1 has no label: choose another with --split"),
        ("torn.parquet", "cannot read it as parquet"),
    ],
)
def test_data_that_cannot_be_used_is_named(
    workplace: Path, tmp_path: Path, broken: dict[str, Path], name: str, says: str
) -> None:
    """What was found and what was expected, before anything is written."""
    pattern = says.replace("(", r"\(").replace(")", r"\)")
    data = DataConfig(name=str(broken[name]))
    with pytest.raises(InputError, match=pattern):
        collect(config(workplace, tmp_path / "store", data=data, num_samples=12))
    assert not (tmp_path / "store" / "zarr.json").exists()
    with pytest.raises(InputError, match=pattern):
        classify(EvalConfig(model=str(workplace / "vit"), data=data))


def test_other_mistakes(workplace: Path, tmp_path: Path) -> None:
    """Too few images, text for an image model, windows of images, and the other way round."""
    run = config(workplace, tmp_path / "store")
    with pytest.raises(InputError, match="has 12 images, --num-samples is 13"):
        collect(replace(run, num_samples=13))
    with pytest.raises(InputError, match="--dataset c4 is text"):
        collect(replace(run, data=DataConfig()))
    with pytest.raises(InputError, match=r"dataset me/typo: expected .* of images"):
        collect(replace(run, data=DataConfig(name="me/typo")))
    with pytest.raises(InputError, match=r"--seq-len 8: .* no windows"):
        collect(replace(run, seq_len=8))
    evaluation = EvalConfig(model=run.model, data=run.data)
    with pytest.raises(InputError, match=r"--max-windows \d+: images have no windows"):
        classify(replace(evaluation, max_windows=1))
    with pytest.raises(InputError, match="not a causal language model"):
        evaluate(evaluation)
    text = str(write_text(tmp_path / "text.txt"))
    model = str(save_tiny("llama", tmp_path / "llama"))
    with pytest.raises(InputError, match="not an image classifier"):
        classify(EvalConfig(model=model, data=DataConfig(name=text)))


def test_without_an_image_processor(tmp_path: Path, workplace: Path) -> None:
    """A model without its preprocessor_config.json, or with another's, is refused by name."""
    model = save_classifier("vit", tmp_path / "model")
    run = config(workplace, tmp_path / "store", model=str(model))
    settings = json.loads((model / "preprocessor_config.json").read_text())
    other = settings | {"size": {"height": 8, "width": 8}}
    (model / "preprocessor_config.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match=r"makes \(3, 8, 8\) .* expects \(3, 16, 16\)"):
        collect(run)
    (model / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match="cannot load its image processor"):
        collect(run)
    (model / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"model has no preprocessor_config\.json"):
        collect(run)


def test_without_pillow(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line says how to install it."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"pip install 'gradpipe\[images\]'"):
        collect(config(workplace, tmp_path / "store"))


def test_a_model_of_another_loss_is_refused(tmp_path: Path, workplace: Path) -> None:
    """Several labels an image have another loss than the cross-entropy of one."""
    model = save_classifier("deit", tmp_path / "model")
    edit_config(model, problem_type="multi_label_classification")
    with pytest.raises(InputError, match="problem_type multi_label_classification: expected"):
        collect(config(workplace, tmp_path / "store", model=str(model)))
