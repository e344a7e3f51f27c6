"""Memory of a streamed collection: one block and one micro-batch, however many samples."""

import gc
from pathlib import Path

import torch

from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.collect.streamed import Streamed
from gradpipe.stages.model.batch import Batch
from gradpipe.stages.model.skeleton import take_apart
from tests.support.models import VOCAB_SIZE, random_ids, save_tiny


def test_more_samples_take_no_more_memory(tmp_path: Path) -> None:
    """Of all tensors that live at once, but for the samples' own tokens, to the byte."""
    model = save_tiny("llama", tmp_path / "model")
    few, many = (_most_bytes(model, tmp_path / f"{count}", count) for count in (2, 8))
    assert few == many > 0


def _most_bytes(model: Path, scratch: Path, count: int) -> int:
    """The most bytes of floating-point tensors when all samples have gone through a block."""
    others = _tensors()  # that other tests left: they stay, so that their ids stay theirs
    left = set(map(id, others))
    skeleton = take_apart(Checkpoint.open(str(model)), torch.float32)
    batch = Batch.of_tokens(random_ids(VOCAB_SIZE, count, 16, seed=0))
    statistics = ("grad_l1", "act_l2", "hessian")
    run = Streamed(skeleton, statistics, batch, 1, torch.device("cpu"), scratch)
    most, steps = 0, 0

    def step(size: int) -> None:
        nonlocal most, steps
        steps += size
        if steps % count:
            return
        storages = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for x in _tensors()
            if id(x) not in left and x.device.type == "cpu" and x.is_floating_point()
        }
        most = max(most, sum(storages.values()))

    for _ in run.run(frozenset(), step):
        pass
    return most


def _tensors() -> list[torch.Tensor]:
    return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
