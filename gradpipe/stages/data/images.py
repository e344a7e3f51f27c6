"""Images and their labels: from folders, tables or the Hub to what a model takes.

A folder has one folder for each class; a table, a `.parquet` file or a data set of the Hub, has a
column of images and one of class labels. Pixels are made by the checkpoint's own image processor on
Pillow. Nothing is augmented: an image gives the same pixels every time.
"""

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow.parquet
from datasets.table import InMemoryTable
from transformers import AutoImageProcessor

from gradpipe.errors import InputError, one_line
from gradpipe.options import refuse_given
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.data.config import PRESETS, DataConfig, Use
from gradpipe.stages.data.samples import Samples
from gradpipe.stages.data.text import load_rows
from gradpipe.stages.model.trial import image_shape

KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
Pixels = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Labelled images, decoded one by one when asked for."""

    name: str  # of the data set
    revision: str | None
    labels: Sequence[int]  # the model's own
    read: Callable[[int], tuple[str, bytes]]  # what an image is called, and its file's bytes


class Processor:
    """Turns images into what a checkpoint's model takes."""

    def __init__(self, checkpoint: Checkpoint, model: Any) -> None:
        """InputError without Pillow, or without the checkpoint's image processor."""
        self._pillow = _pillow()
        self._checkpoint = checkpoint
        self._shape_CHW = image_shape(model)
        if not any((checkpoint.folder / name).is_file() for name in _PROCESSOR_FILES):
            raise InputError(
                f"{checkpoint.name} has no preprocessor_config.json, which says how images become "
                "pixels: copy it from the model that this one was made of"
            )
        try:
            self._processor: Any = AutoImageProcessor.from_pretrained(
                checkpoint.folder, backend="pil", trust_remote_code=False
            )
        except Exception as error:  # each processor has validators of its own
            raise InputError(
                f"{checkpoint.name}: cannot load its image processor: {one_line(error)}"
            ) from error

    def pixels(self, images: Images, index: int) -> Pixels:
        """One image, (channels, height, width); InputError names it if it is broken."""
        name, data = images.read(index)
        try:
            kinds = tuple(KINDS.values())
            with self._pillow.Image.open(io.BytesIO(data), formats=kinds) as image:
                mode = image.mode
                decoded = self._pillow.ImageOps.exif_transpose(image).convert("RGB")
        except Exception as error:  # decoders raise from many families
            raise InputError(
                f"dataset {images.name}: {name} is not an image that can be read, one of "
                f"{', '.join(KINDS)}: {one_line(error)}"
            ) from error
        if mode.startswith(("I", "F")):
            raise InputError(
                f"dataset {images.name}: {name} has more than 8 bits a pixel (Pillow's mode "
                f"{mode}), of which all beyond 255 would become white: convert it to 8 bits"
            )
        made = self._processor(
            np.asarray(decoded), input_data_format="channels_last", return_tensors="np"
        )["pixel_values"][0]
        if made.shape != self._shape_CHW:
            raise InputError(
                f"{self._checkpoint.name}: its image processor makes {made.shape} of {name}, "
                f"its config.json expects {self._shape_CHW}: the two are of different models"
            )
        return np.ascontiguousarray(made, dtype=np.float32)


def load_images(data: DataConfig, use: Use, checkpoint: Checkpoint, model: Any) -> Images:
    """The images behind `data` with the model's labels; InputError if there are none."""
    refuse_given(data, ("text_column",), "images are read, and no text")
    ids = model.config.label2id or {name: i for i, name in model.config.id2label.items()}
    classes = _Classes(checkpoint.name, ids, model.config.num_labels)
    path = Path(data.name)
    if data.name in PRESETS:
        raise InputError(
            f"--dataset {data.name} is text, {checkpoint.name} classifies images: give a folder "
            "with one folder for each class, a .parquet file or a Hub id"
        )
    if path.is_dir():
        return _folder_images(path, classes)
    if path.exists():
        return _table_images(data.name, _parquet_rows(path), None, classes)
    rows, revision = load_rows(data, use)
    return _table_images(data.name, rows, revision, classes)


def draw_images(
    images: Images,
    processor: Processor,
    num_samples: int,
    num_tokens: int,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Samples:
    """`num_samples` different images, drawn with `random.Random(seed)`.

    `num_tokens` is what the blocks see of an image; `advance` hears of images decoded. Raises
    InputError if there are fewer, or one is broken.
    """
    count = len(images.labels)
    if count < num_samples:
        raise InputError(
            f"dataset {images.name} has {count} images, --num-samples is {num_samples}: "
            "ask for fewer"
        )
    drawn = random.Random(seed).sample(range(count), num_samples)
    pixels = []
    for index in drawn:
        pixels.append(processor.pixels(images, index))
        advance(1)
    return Samples.of(
        {
            "pixel_values": np.stack([x.reshape(-1) for x in pixels]),
            "labels": np.array([images.labels[index] for index in drawn], dtype=np.int64),
            "sources": np.array([(index, 0) for index in drawn], dtype=np.int64),
        },
        dataset=images.name,
        revision=images.revision,
        sampling="images",
        seed=seed,
        seq_len=num_tokens,
        image_shape=pixels[0].shape,
    )


@dataclass(frozen=True, slots=True)
class _Classes:
    """The classes that a model tells apart."""

    model: str
    ids: dict[str, int]  # by name
    count: int

    def labels(self, names: Sequence[str]) -> list[int] | None:
        """The model's label of each class of a data set; None if the classes cannot be matched.

        By name, or in the order given where no name is the model's and there are as many.
        """
        known = [name in self.ids for name in names]
        if names and all(known):
            return [int(self.ids[name]) for name in names]
        return list(range(self.count)) if not any(known) and len(names) == self.count else None

    def mismatch(self, dataset: str, names: Sequence[str]) -> InputError:
        """The error, with both lists of classes."""
        return InputError(
            f"dataset {dataset} has {len(names)} classes ({_some(names)}), {self.model} has "
            f"{self.count} ({_some([*self.ids])}): expected the same names, or as many"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *(["…"] if len(names) > 3 else [])])


def _folder_images(folder: Path, classes: _Classes) -> Images:
    """Images below one folder for each class, in the order of their paths."""
    files = sorted(
        path for path in folder.glob("*/**/*") if path.suffix.lower() in KINDS and path.is_file()
    )
    names = sorted({path.relative_to(folder).parts[0] for path in files})
    if not names:
        raise InputError(
            f"dataset {folder}: expected one folder for each class, with images in it "
            f"({', '.join(KINDS)})"
        )
    labels = classes.labels(names)
    if labels is None:
        raise classes.mismatch(str(folder), names)
    is_numbered = all(name.isdecimal() and name not in classes.ids for name in names)
    if is_numbered and names != sorted(names, key=int):
        raise InputError(
            f"dataset {folder}: its classes are numbers, whose order by name ({_some(names)}) is "
            f"not that of their values: name them as {classes.model} does "
            f"({_some([*classes.ids])}), or of one length, as 00, 01"
        )
    by_name = dict(zip(names, labels, strict=True))

    def read(index: int) -> tuple[str, bytes]:
        return str(files[index].relative_to(folder)), files[index].read_bytes()

    found = [by_name[path.relative_to(folder).parts[0]] for path in files]
    return Images(name=str(folder), revision=None, labels=found, read=read)


def _parquet_rows(path: Path) -> Any:
    """The rows of a file; `from_parquet` would take them from a cache that goes by its date."""
    if path.suffix != ".parquet":
        raise InputError(f"dataset {path}: expected a folder of images, or a .parquet file")
    try:
        return datasets.Dataset(InMemoryTable(pyarrow.parquet.read_table(path)))
    except Exception as error:  # datasets and pyarrow raise from many families
        raise InputError(f"dataset {path}: cannot read it as parquet: {one_line(error)}") from error


def _table_images(name: str, rows: Any, revision: str | None, classes: _Classes) -> Images:
    """Images of a table's one column of images, labelled by its one column of known classes."""
    images = [x for x, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    kinds = {x: k for x, k in rows.features.items() if isinstance(k, datasets.ClassLabel)}
    if len(images) != 1 or not kinds:
        raise InputError(
            f"dataset {name}: expected one column of images and one of class labels; "
            f"it has {', '.join(f'{x}: {type(k).__name__}' for x, k in rows.features.items())}"
        )
    known = {x: found for x, kind in kinds.items() if (found := classes.labels(kind.names))}
    if len(known) != 1:
        raise classes.mismatch(name, next(iter(kinds.values())).names)
    [(column, labels)] = known.items()
    numbers = rows[column][:]
    if unlabelled := [i for i, x in enumerate(numbers) if x is None or not 0 <= x < len(labels)]:
        raise InputError(
            f"dataset {name}: row {unlabelled[0] + 1} has no label: choose another with --split"
        )
    encoded = rows.cast_column(images[0], datasets.Image(decode=False))

    def read(index: int) -> tuple[str, bytes]:
        image = encoded[index][images[0]] or {}
        data, path = image.get("bytes"), image.get("path")  # a repository of files has only paths
        if data is None and path is not None:
            data = Path(path).read_bytes()
        return f"row {index + 1}", data or b""

    return Images(name=name, revision=revision, labels=[labels[x] for x in numbers], read=read)


def _pillow() -> Any:
    try:
        import PIL.Image  # noqa: PLC0415 (an extra: text needs none)
        import PIL.ImageOps  # noqa: PLC0415
    except ImportError as error:
        raise InputError("images need Pillow: pip install 'gradpipe[images]'") from error
    return PIL
