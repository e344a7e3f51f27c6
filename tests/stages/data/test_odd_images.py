"""Images and classes as people have them: numbered folders, lying photographs, 16-bit greys."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gradpipe import DataConfig, GradientStore, InputError, collect
from tests.support.cases import collecting
from tests.support.vision import CLASSES, SIZE, image_table, save_classifier, write_images
from tests.support.workplace import edit_config, run_pipe

ORIENTATION, TURNED = 0x0112, 6  # the EXIF tag of an image to be turned right to be seen


def collected(root: Path, images: Path, num_samples: int) -> GradientStore:
    """A store of the root's model."""
    data = DataConfig(name=str(images))
    changes = {"data": data, "num_samples": num_samples, "seq_len": None}
    return collect(collecting(root, None, **changes, statistics=("act_l2",)))


def test_classes_are_known_by_their_names_of_ids_alone(tmp_path: Path) -> None:
    """A config may say what each label is called, and not which label a name is."""
    model = save_classifier("vit", tmp_path / "model")
    edit_config(model, label2id=None, id2label={"0": "square", "1": "circle", "2": "cross"})
    images = write_images(tmp_path / "images", count=1)
    arrays = collected(tmp_path, images, 3).calibration().arrays
    names = [CLASSES[index] for index in arrays["sources"][:, 0]]  # in the order of their paths
    expected = {"square": 0, "circle": 1, "cross": 2}
    assert [expected[name] for name in names] == arrays["labels"].tolist()


def test_numbers_in_the_order_of_text_are_refused(tmp_path: Path) -> None:
    """Folder 10 comes before folder 2: which class was meant is not to be guessed."""
    count = 11
    labels = {f"LABEL_{index}": index for index in range(count)}
    names = {index: name for name, index in labels.items()}
    save_classifier("vit", tmp_path / "model", id2label=names, label2id=labels)
    images = write_images(tmp_path / "0", 1, tuple(str(x) for x in range(count)))
    with pytest.raises(InputError, match=r"numbers.*0, 1, 10, ….*LABEL_0"):
        collected(tmp_path, images, count)
    images = write_images(tmp_path / "00", 1, tuple(f"{x:02}" for x in range(count)))
    arrays = collected(tmp_path, images, count).calibration().arrays
    np.testing.assert_array_equal(arrays["labels"], arrays["sources"][:, 0])


def test_a_photograph_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    """As transformers and `datasets` turn it."""
    save_classifier("vit", tmp_path / "model")
    images = write_images(tmp_path / "images", count=1)
    image = Image.fromarray(np.repeat([[255], [0]], 8, axis=0).repeat(16, axis=1).astype(np.uint8))
    exif = image.getexif()
    exif[ORIENTATION] = TURNED
    (images / "circle" / "00.png").unlink()
    image.save(images / "circle" / "00.jpg", exif=exif)
    arrays = collected(tmp_path, images, 3).calibration().arrays
    pixels = arrays["pixel_values"][arrays["labels"].argmin()].reshape(3, SIZE, SIZE)
    assert (pixels[:, :, SIZE // 2 :] > 0.9).all()  # what lay on top is on the right
    assert (pixels[:, :, : SIZE // 2] < -0.9).all()


def test_sixteen_bits_are_not_cut_to_white(tmp_path: Path) -> None:
    """Pillow would, without a word."""
    save_classifier("vit", tmp_path / "model")
    images = write_images(tmp_path / "images", count=1)
    Image.fromarray(np.full((20, 20), 20_000, dtype=np.uint16)).save(images / "cross" / "00.png")
    with pytest.raises(InputError, match=r"cross/00\.png has more than 8 bits"):
        collected(tmp_path, images, 3)


def test_a_table_leaves_no_bars_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What goes wrong is one line there, and so is what goes well."""
    save_classifier("vit", tmp_path / "model")
    image_table(write_images(tmp_path / "images")).to_parquet(tmp_path / "images.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    capfd.readouterr()
    command = "collect-grads model {} --dataset images.parquet --num-samples {}"
    assert run_pipe(monkeypatch, *shlex.split(command.format("store", 3))) == 0
    assert [x.split()[0] for x in capfd.readouterr().err.splitlines()] == ["schedule"]
    assert run_pipe(monkeypatch, *shlex.split(command.format("more", 13))) == 2
    assert [x.split()[0] for x in capfd.readouterr().err.splitlines()] == ["pipe:"]


def test_a_table_is_what_is_in_the_file_now(tmp_path: Path) -> None:
    """Also if another was there at the same hour, as files of an archive may be."""
    save_classifier("vit", tmp_path / "model")
    table, labels = image_table(write_images(tmp_path / "images")), list[list[int]]()
    for name, rows in (("one", range(12)), ("other", range(11, -1, -1))):
        table.select(rows).to_parquet(tmp_path / "images.parquet")
        os.utime(tmp_path / "images.parquet", (0, 0))
        run = collecting(tmp_path, tmp_path / name, num_samples=12, seq_len=None)
        data = DataConfig(name=str(tmp_path / "images.parquet"))
        store = collect(replace(run, data=data, statistics=("act_l2",)))
        labels.append(store.calibration().arrays["labels"].tolist())
    assert labels[1] == [2 - label for label in labels[0]]


@pytest.mark.parametrize("schedule", ["resident", "streamed"])
@pytest.mark.parametrize("family", ["vit", "deit"])  # deit's loss is ours, vit's its own
def test_a_large_batch_fits_float16(tmp_path: Path, schedule: str, family: str) -> None:
    """Its loss, a number of float16 too, is not multiplied by what is beyond them all."""
    save_classifier(family, tmp_path / "model")
    data = DataConfig(name=str(write_images(tmp_path / "images", count=6)))
    run = collecting(tmp_path, data=data, num_samples=18, seq_len=None, schedule=schedule)
    whole = collect(replace(run, dtype="float16", batch_size=17))
    single = collect(replace(run, dtype="float16", store=tmp_path / "single"))
    for layer in whole.spec.layers:
        got, expected = (x.read_norms(layer, "grad_l1") for x in (whole, single))
        assert np.abs(got - expected).max() < 0.05 * np.sqrt((expected**2).mean())
