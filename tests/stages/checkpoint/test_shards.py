"""Files of a checkpoint that disagree, cannot be read or lie elsewhere: which, and what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gradpipe.errors import InputError
from gradpipe.stages.checkpoint.folder import INDEX_NAME, SINGLE_NAME, Checkpoint
from tests.support.models import save_tiny

KEY = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of several files."""
    return save_tiny("llama", tmp_path / "model", max_shard_size="20KB")


def _rename(model: Path, key: str, file: str) -> str:
    """Make the index say that a tensor is in `file`; where it was before."""
    index = json.loads((model / INDEX_NAME).read_text())
    old: str = index["weight_map"][key]
    index["weight_map"][key] = file
    (model / INDEX_NAME).write_text(json.dumps(index))
    return old


@pytest.mark.parametrize(
    ("file", "is_refused"), [("a.safetensors", True), ("z.safetensors", False)]
)
def test_a_tensor_in_two_files_is_what_transformers_reads(
    model: Path, file: str, *, is_refused: bool
) -> None:
    """It takes the last file's, whatever the index says; where the two differ, it is refused."""
    old = _rename(model, KEY, file)
    weight = load_file(model / old)[KEY]
    save_file({KEY: 2 * weight}, model / file, metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    taken = loaded.get_parameter(KEY)
    assert torch.equal(taken, weight if is_refused else 2 * weight)
    if not is_refused:
        assert torch.equal(Checkpoint.open(str(model)).read(KEY), taken)
        return
    with pytest.raises(InputError, match=f"{KEY} is in {file}.* and in {old}.*: leave it in one"):
        Checkpoint.open(str(model))


def test_an_index_that_names_the_wrong_file_is_told_the_right_one(model: Path) -> None:
    """The tensor is there, elsewhere."""
    index = json.loads((model / INDEX_NAME).read_text())["weight_map"]
    other = next(file for file in index.values() if file != index[KEY])
    old = _rename(model, KEY, other)
    with pytest.raises(InputError, match=f"does not hold it: {old} does: mend the index"):
        Checkpoint.open(str(model))


def test_files_in_folders_of_their_own_are_named(model: Path) -> None:
    """They are inside the checkpoint, and still no file that is read."""
    _rename(model, KEY, "w/a.safetensors")
    with pytest.raises(InputError, match=r"names w/a\.safetensors, expected files beside it"):
        Checkpoint.open(str(model))


def test_an_index_without_metadata_is_told_what_transformers_asks_for(model: Path) -> None:
    """It would say no more than that key's name, and with it, be it empty, it loads."""
    index = json.loads((model / INDEX_NAME).read_text())
    (model / INDEX_NAME).write_text(json.dumps({"weight_map": index["weight_map"]}))
    with pytest.raises(KeyError):
        AutoModelForCausalLM.from_pretrained(model)
    with pytest.raises(InputError, match=r'has no metadata.*: add "metadata": \{\} to it'):
        Checkpoint.open(str(model))
    (model / INDEX_NAME).write_text(json.dumps({**index, "metadata": {}}))
    AutoModelForCausalLM.from_pretrained(model)
    Checkpoint.open(str(model))


def test_weights_without_the_right_to_read_them_are_not_called_damaged(tmp_path: Path) -> None:
    """Nothing is to be fetched again."""
    model = save_tiny("llama", tmp_path / "model")
    weights = model / SINGLE_NAME
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    weights.chmod(0)
    with pytest.raises(InputError, match=r"cannot read .*: Permission denied") as caught:
        Checkpoint.open(str(model))
    assert "fetch" not in str(caught.value)
