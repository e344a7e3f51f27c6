"""A short sample of `tests/faults/kill_ranks.py`, which see."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_the_same_command_goes_on() -> None:
    """Eight kills at random instants: the others end with 75, the rerun with the same bytes."""
    script = Path(__file__).with_name("kill_ranks.py")
    done = subprocess.run(
        [sys.executable, script, "--times", "8", "--seed", "3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed" in done.stdout
