"""Where parts of a tensor lie, and files copied with some places replaced."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradpipe import InputError
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.checkpoint.rewrite import rewriting
from gradpipe.stages.checkpoint.tensors import as_tensor, tensor_bytes
from gradpipe.store.objects import digest

TENSORS = {
    "flat": torch.arange(24, dtype=torch.float32).reshape(6, 4),
    "fused": torch.arange(30, dtype=torch.bfloat16).reshape(3, 2, 5),
    "norm": torch.ones(7),
    "scale": torch.tensor(2.0),
    "empty": torch.ones(0, 4),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """A folder of one file: matrices one below the other, and matrices in a stack."""
    (tmp_path / "model").mkdir()
    save_file(TENSORS, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    return Checkpoint.open(str(tmp_path / "model"))


@pytest.mark.parametrize(("key", "count"), [("flat", 1), ("flat", 2), ("flat", 3), ("fused", 3)])
def test_a_part_is_a_run_of_the_tensors_rows(checkpoint: Checkpoint, key: str, count: int) -> None:
    """All parts together are the tensor, in order, each a matrix."""
    for index, expected in enumerate(TENSORS[key].reshape(-1, TENSORS[key].shape[-1]).chunk(count)):
        place = checkpoint.tensors[key].part(index, count)
        assert place.is_matrix
        assert torch.equal(as_tensor(checkpoint.read_place(place), place), expected)


@pytest.mark.parametrize(
    ("key", "index", "count"),
    [
        *(("flat", 0, 4), ("fused", 0, 2), ("flat", 3, 3), ("norm", 0, 7)),
        *(("scale", 0, 1), ("empty", 0, 0), ("flat", 0, 0)),
    ],
)
def test_parts_that_a_tensor_does_not_have_are_refused(
    checkpoint: Checkpoint, key: str, index: int, count: int
) -> None:
    """Unequal ones, one beyond the last, parts of a vector or a number, no parts at all."""
    with pytest.raises(InputError, match=f"{key} of shape .* has no part {index} of {count}"):
        checkpoint.tensors[key].part(index, count)


def test_replacing_parts_changes_nothing_else(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Each output gets its own tensors, the other bytes are the source's; digests are returned."""
    outputs = [tmp_path / "a", tmp_path / "b"]
    places = [checkpoint.tensors["flat"].part(1, 3), checkpoint.tensors["fused"].part(2, 3)]
    source = checkpoint.folder / "model.safetensors"
    with rewriting(source, outputs, places) as file:
        for place in places:
            values = [torch.full(place.shape, i, dtype=TENSORS[place.key].dtype) for i in (7, 8)]
            digests = file.replace(place, iter(values))
            assert digests == [digest(tensor_bytes(value)) for value in values]
        file.copy_rest()
    for output, value in zip(outputs, (7, 8), strict=True):
        expected = {key: tensor.clone() for key, tensor in TENSORS.items()}
        expected["flat"][2:4] = value
        expected["fused"][2] = value
        assert output.stat().st_size == source.stat().st_size
        assert all(torch.equal(expected[key], x) for key, x in load_file(output).items())
