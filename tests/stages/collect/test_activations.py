"""What the streamed schedule keeps, and what is left to do with it."""

from pathlib import Path

import pytest
import torch

from gradpipe.errors import GradpipeError
from gradpipe.stages.collect.activations import Kept, TensorFile, Todo, remaining

DEPTH = 4
EVERY = frozenset(range(DEPTH))


def left(
    blocks: frozenset[int],
    inputs: tuple[int, ...] = (),
    gradients: tuple[int, ...] = (),
    *,
    head: bool = False,
    backward: bool = True,
) -> Todo:
    """What is left of four blocks."""
    kept = Kept(inputs=frozenset(inputs), gradients=frozenset(gradients), outside=frozenset())
    return remaining(DEPTH, kept, blocks, head=head, backward=backward)


def test_from_nothing_everything_runs() -> None:
    """Forward through all blocks, the head, and back."""
    assert left(EVERY) == Todo(forward=(0, 1, 2, 3), head=True, backward=(3, 2, 1, 0))


def test_without_a_backward_pass_the_last_block_runs_once() -> None:
    """What comes out of the last block is for the head alone."""
    assert left(EVERY, backward=False) == Todo(forward=(0, 1, 2), head=False, backward=(3, 2, 1, 0))
    assert left(EVERY, backward=False, head=True).forward == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("blocks", "inputs", "gradients", "expected"),
    [
        ({0, 1}, (1, 2), (2,), Todo(forward=(), head=False, backward=(1, 0))),
        ({0}, (), (1,), Todo(forward=(), head=False, backward=(0,))),
        ({0, 1}, (2,), (2,), Todo(forward=(0,), head=False, backward=(1, 0))),
        ({0, 1}, (1,), (), Todo(forward=(1, 2, 3), head=True, backward=(3, 2, 1, 0))),
        ({3}, (1, 2), (1, 2), Todo(forward=(2, 3), head=True, backward=(3,))),
        ({1, 3}, (1, 3, 4), (2, 4), Todo(forward=(), head=False, backward=(3, 1))),
        (set(), (), (), Todo(forward=(), head=False, backward=())),
    ],
)
def test_only_what_is_missing_runs(
    blocks: set[int], inputs: tuple[int, ...], gradients: tuple[int, ...], expected: Todo
) -> None:
    """Blocks that are done run again only for a gradient, or inputs, that are nowhere."""
    assert left(frozenset(blocks), inputs, gradients) == expected


@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 0, 2)])
def test_tensors_come_back_as_they_lay_in_memory(axes: tuple[int, ...], tmp_path: Path) -> None:
    """Of a transposed tensor a product may have other last bits than of its copy in order."""
    tensor = torch.arange(24.0).reshape(2, 3, 4).permute(axes)
    file = TensorFile(tmp_path / "inputs", (1,))
    file.write({"a": tensor, "every second": tensor[..., ::2], "one": tensor[:1]})
    file.publish()
    found = TensorFile(tmp_path / "inputs", (1,)).read(0)
    assert found["a"].stride() == tensor.stride()
    assert torch.equal(found["a"], tensor)
    assert torch.equal(found["every second"], tensor[..., ::2])
    assert torch.equal(found["one"], tensor[:1])


def test_whatever_is_kept_each_step_has_what_it_needs() -> None:
    """For every set of files and of blocks, a run in order never lacks an input or a gradient."""
    boundaries = range(1, DEPTH + 1)
    subsets = [frozenset(i for i in range(DEPTH + 1) if bits >> i & 1) for bits in range(2**5)]
    for blocks in (s for s in subsets if DEPTH not in s):
        for inputs in (s for s in subsets if 0 not in s):
            for gradients in (s for s in subsets if 0 not in s):
                todo = left(blocks, tuple(inputs), tuple(gradients))
                have, after = {0, *inputs}, set(gradients)
                for index in todo.forward:
                    assert index in have
                    have.add(index + 1)
                if todo.head:
                    assert DEPTH in have
                    after.add(DEPTH)
                for index in todo.backward:
                    assert index in have
                    assert index + 1 in after
                    after.add(index)
                assert blocks <= set(todo.backward)
                assert not set(todo.forward) & {i - 1 for i in boundaries if i in inputs}


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    """Of any type and shape, by micro-batch; one tensor under two names is kept once."""
    file = TensorFile(tmp_path / "inputs", (2, 1))
    hidden, ids = torch.randn(2, 3, 4, dtype=torch.bfloat16), torch.arange(6).reshape(2, 3)
    flags, empty = torch.tensor([True, False]), torch.zeros(0, 5)
    file.write({"hidden": hidden, "same": hidden, "ids": ids, "flags": flags, "empty": empty})
    assert not file.exists()
    file.write({"scalar": torch.tensor(2.5)})
    file.publish()
    again = TensorFile(tmp_path / "inputs", (2, 1))
    assert again.exists()
    found = again.read(0)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "hidden": torch.bfloat16,
        "same": torch.bfloat16,
        "ids": torch.int64,
        "flags": torch.bool,
        "empty": torch.float32,
    }
    assert torch.equal(found["hidden"], hidden)
    assert torch.equal(found["same"], hidden)
    assert torch.equal(found["ids"], ids)
    assert found["empty"].shape == (0, 5)
    assert again.read(1, ["scalar", "other"]) == {"scalar": torch.tensor(2.5)}
    assert (tmp_path / "inputs").stat().st_size < 2 * hidden.nbytes + 2 * ids.nbytes + 700


@pytest.mark.parametrize("damage", ["cut", "emptied", "other sizes"])
def test_a_file_that_is_not_whole_does_not_exist(tmp_path: Path, damage: str) -> None:
    """Cut off, empty, or of other micro-batches: it is made again."""
    file = TensorFile(tmp_path / "inputs", (1,))
    file.write({"hidden": torch.ones(1, 8)})
    file.publish()
    data = (tmp_path / "inputs").read_bytes()
    if damage != "other sizes":
        (tmp_path / "inputs").write_bytes(data[3:] if damage == "cut" else b"")
    sizes = (1, 1) if damage == "other sizes" else (1,)
    assert not TensorFile(tmp_path / "inputs", sizes).exists()


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    """One line, with what to do."""
    with pytest.raises(GradpipeError, match=r"scratch file .*inputs: No such file.*--scratch"):
        TensorFile(tmp_path / "inputs", (1,)).read(0)
