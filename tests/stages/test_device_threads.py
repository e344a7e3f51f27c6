"""How many threads are taken: what the user says, and no more than there are cores for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from gradpipe.stages import device
from gradpipe.stages.device import torch_threads, usable_threads


@pytest.mark.parametrize(
    ("limit", "most"),
    [("100000 100000\n", 1), ("50000 100000\n", 1), ("250000 100000\n", 2), ("max 100000\n", 64)],
)
def test_threads_are_no_more_than_the_cgroup_and_the_affinity_allow(
    limit: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Part of a core counts for none, though there is always one."""
    (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr(device, "_CPU_LIMIT", tmp_path / "cpu.max")
    with torch_threads(64):
        assert usable_threads() == min(most, len(os.sched_getaffinity(0)))


def test_torch_has_its_threads_again() -> None:
    """Also after an error."""
    before = torch.get_num_threads()

    def fail() -> None:
        with torch_threads(before + 2):
            assert torch.get_num_threads() == before + 2
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert torch.get_num_threads() == before
