"""Train a tiny ViT on images that every machine can draw: shapes on noise, among distractors.

    python scripts/train_tiny_vit.py OUT
    python scripts/train_tiny_vit.py OUT --hidden 32 --blocks 2 --steps 300

OUT becomes a folder with `model`, a Hugging Face directory, and two folders of PNG files with one
folder for each class: `calibration`, drawn as the training images are, and `heldout`. It takes one
core and some minutes, and the same seed gives the same files.

Shapes: B images, S pixels a side, C colours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import numpy.typing as npt
import torch
import typer
from PIL import Image
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from gradpipe.errors import InputError

SIZE: Final = 32
PATCH: Final = 8
NOISE: Final = 0.12  # standard deviation, of a colour from 0 to 1
DARK, BRIGHT, ANY = (0.0, 0.45), (0.55, 1.0), (0.0, 1.0)  # background, shape, distractors
TURN: Final = 0.6  # radians, at most, either way
DISTRACTORS: Final = 4  # discs and squares too small to be the shape
PEAK_LEARNING_RATE: Final = 1.5e-3
WARMUP_STEPS: Final = 100
WEIGHT_DECAY: Final = 0.05
REPORTS: Final = 10

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The size of the model, how long it is trained, and how many images are kept."""

    hidden: int = 64
    blocks: int = 4
    heads: int = 4
    steps: int = 3000
    batch_size: int = 128
    seed: int = 0
    num_calibration: int = 512
    num_heldout: int = 2000

    def __post_init__(self) -> None:
        """Check what transformers would refuse without naming the option."""
        if self.hidden % self.heads:
            raise InputError(f"--hidden {self.hidden} must be a multiple of --heads {self.heads}")


def box(u: Floats, v: Floats) -> Floats:
    """Distance from the centre, square for what is square."""
    return np.maximum(np.abs(u), np.abs(v))


def stem(u: Floats, v: Floats) -> Bools:
    """An upright bar."""
    return (np.abs(u) < 0.25) & (np.abs(v) < 0.9)


# Which points (u, v) are inside a shape that is about 1 in radius.
SHAPES: Final[dict[str, Callable[[Floats, Floats], Bools]]] = {
    "bar": stem,
    "crescent": lambda u, v: (np.hypot(u, v) < 0.95) & (np.hypot(u - 0.5, v) > 0.75),
    "cross": lambda u, v: stem(u, v) | stem(v, u),
    "disc": lambda u, v: np.hypot(u, v) < 0.85,
    "ell": lambda u, v: stem(u + 0.5, v) | stem(v - 0.65, u),
    "frame": lambda u, v: (box(u, v) < 0.8) & (box(u, v) > 0.45),
    "ring": lambda u, v: (np.hypot(u, v) < 0.95) & (np.hypot(u, v) > 0.55),
    "square": lambda u, v: box(u, v) < 0.75,
    "tee": lambda u, v: stem(u, v) | stem(v + 0.65, u),
    "triangle": lambda u, v: (v < 0.5) & (v > math.sqrt(3) * np.abs(u) - 1),
}
CLASSES: Final = tuple(SHAPES)


def draw(labels_B: npt.NDArray[np.int64], generator: np.random.Generator) -> Bytes:
    """One image of each label, (B, S, S, C): place, size, turn, colours and distractors vary."""
    count = len(labels_B)
    background_BC = generator.uniform(*DARK, (count, 3))
    images = np.tile(background_BC[:, None, None], (1, SIZE, SIZE, 1))
    places = generator.uniform(-0.9, 0.9, (DISTRACTORS, count, 2))
    for number, place_B2 in enumerate(places):
        u, v = _coordinates(place_B2, generator.uniform(0.1, 0.2, count), np.zeros(count))
        small = SHAPES["disc" if number % 2 else "square"]
        images = _painted(images, small(u, v), generator.uniform(*ANY, (count, 3)))
    place_B2 = generator.uniform(-0.3, 0.3, (count, 2))
    turns = generator.uniform(-TURN, TURN, count)
    u, v = _coordinates(place_B2, generator.uniform(0.45, 0.7, count), turns)
    mask = np.zeros(u.shape, dtype=bool)
    for label, name in enumerate(CLASSES):
        chosen = labels_B == label
        mask[chosen] = SHAPES[name](u[chosen], v[chosen])
    images = _painted(images, mask, generator.uniform(*BRIGHT, (count, 3)))
    images += generator.normal(0, NOISE, images.shape)
    return (images.clip(0, 1) * 255).round().astype(np.uint8)


def _coordinates(place_B2: Floats, radius_B: Floats, turn_B: Floats) -> tuple[Floats, Floats]:
    """Every pixel as a shape of that place, radius and turn sees it: two (B, S, S)."""
    axis = (np.arange(SIZE) + 0.5) / SIZE * 2 - 1
    x = axis[None, None, :] - place_B2[:, 0, None, None]
    y = axis[None, :, None] - place_B2[:, 1, None, None]
    cos, sin = np.cos(turn_B)[:, None, None], np.sin(turn_B)[:, None, None]
    radius = radius_B[:, None, None]
    return (cos * x + sin * y) / radius, (cos * y - sin * x) / radius


def _painted(images: Floats, mask_BSS: Bools, colour_BC: Floats) -> Floats:
    return np.where(mask_BSS[..., None], colour_BC[:, None, None], images)


def batch(recipe: Recipe, step: int) -> tuple[Tensor, Tensor]:
    """The fresh images of a step, as the model takes them, and their labels."""
    generator = np.random.default_rng((recipe.seed, 0, step))
    labels_B = generator.integers(0, len(CLASSES), recipe.batch_size)
    return as_pixels(draw(labels_B, generator)), torch.from_numpy(labels_B)


def as_pixels(images: Bytes) -> Tensor:
    """Images as the saved image processor makes them: (B, C, S, S), from -1 to 1."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def kept_images(recipe: Recipe, part: int, count: int) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """As many images of each class, of part 1 (calibration) or 2 (held out)."""
    generator = np.random.default_rng((recipe.seed, part, 0))
    labels_B = np.arange(count) % len(CLASSES)
    return draw(labels_B, generator), labels_B


def build_model(recipe: Recipe) -> ViTForImageClassification:
    """An untrained model, the same for the same seed."""
    torch.manual_seed(recipe.seed)
    config = ViTConfig(
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        intermediate_size=4 * recipe.hidden,
        image_size=SIZE,
        patch_size=PATCH,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: label for label, name in enumerate(CLASSES)},
    )
    return ViTForImageClassification(config)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to nothing."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LEARNING_RATE * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def accuracy(model: ViTForImageClassification, images: Bytes, labels_B: Tensor) -> float:
    """Top-1 accuracy, 0 to 1."""
    model.eval()
    chosen = [model(pixel_values=x).logits.argmax(-1) for x in as_pixels(images).split(250)]
    model.train()
    return float((torch.cat(chosen) == labels_B).float().mean())


def train(model: ViTForImageClassification, recipe: Recipe) -> None:
    """Train in place, with a line on stderr about ten times on the way."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    images, labels = kept_images(recipe, 2, recipe.num_heldout)
    start = time.monotonic()
    model.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.steps)
        pixels_BCSS, labels_B = batch(recipe, step)
        loss = model(pixel_values=pixels_BCSS, labels=labels_B).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(1, recipe.steps // REPORTS) == 0:
            share = 100 * accuracy(model, images[:500], torch.from_numpy(labels[:500]))
            minutes = (time.monotonic() - start) / 60
            report(
                f"step {step + 1}: loss {loss.item():.3f}, top-1 {share:.1f} %, {minutes:.1f} min"
            )
    model.eval()


def save_images(folder: Path, images: Bytes, labels_B: npt.NDArray[np.int64]) -> None:
    """Write PNG files, one folder for each class."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for number, (image, label) in enumerate(zip(images, labels_B, strict=True)):
        Image.fromarray(image).save(folder / CLASSES[label] / f"{number:05}.png")


def report(line: str) -> None:
    """Say something to whoever waits."""
    typer.echo(line, err=True)


def run(out: Path, recipe: Recipe) -> None:
    """Train, measure and save, beside the place and then renamed into it."""
    if out.exists():
        raise InputError(f"{out} exists already: give a new path, or remove it first")
    torch.set_num_threads(1)  # sums in one order: the same bits whatever the number of cores
    model = build_model(recipe)
    report(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, recipe)
    partial = out.with_name(out.name + ".partial")
    for part, name in enumerate(("calibration", "heldout"), 1):
        count = recipe.num_calibration if part == 1 else recipe.num_heldout
        images, labels_B = kept_images(recipe, part, count)
        save_images(partial / name, images, labels_B)
    share = 100 * accuracy(model, images, torch.from_numpy(labels_B))
    report(f"held-out top-1 {share:.2f} % ({len(images)} images)")
    model.save_pretrained(partial / "model")
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(partial / "model")
    partial.rename(out)


RECIPE: Final = Recipe()


def main(  # noqa: PLR0913, PLR0917 - one parameter per option
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    hidden: Annotated[int, typer.Option(min=4)] = RECIPE.hidden,
    blocks: Annotated[int, typer.Option(min=1)] = RECIPE.blocks,
    heads: Annotated[int, typer.Option(min=1)] = RECIPE.heads,
    steps: Annotated[int, typer.Option(min=1)] = RECIPE.steps,
    batch_size: Annotated[int, typer.Option(min=1)] = RECIPE.batch_size,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and images.")] = RECIPE.seed,
    num_calibration: Annotated[int, typer.Option(min=10)] = RECIPE.num_calibration,
    num_heldout: Annotated[int, typer.Option(min=10)] = RECIPE.num_heldout,
) -> None:
    """Train a tiny ViT on shapes; write the model, and images to calibrate and evaluate on."""
    try:
        recipe = Recipe(
            hidden=hidden,
            blocks=blocks,
            heads=heads,
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            num_calibration=num_calibration,
            num_heldout=num_heldout,
        )
        run(out, recipe)
    except InputError as error:
        report(f"error: {error}")
        raise typer.Exit(2) from error
    typer.echo(out)


if __name__ == "__main__":
    typer.run(main)
