"""Short samples of `tests/faults/kill.py` and `tests/faults/kill_ranks.py`, which see."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "command",
    [
        "kill.py --kills 12 --seed 5",
        pytest.param("kill_ranks.py --times 8 --seed 3", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_with_the_bytes_of_an_uninterrupted_one(command: str) -> None:
    """Kills at random instants: same names, same bytes, no stray file after the rerun.

    One killed rank ends all others, with 75.
    """
    script, *words = command.split()
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(script), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed" in done.stdout
