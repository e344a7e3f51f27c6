"""A short sample of `tests/faults/kill.py`, which see."""

import subprocess
import sys
from pathlib import Path


def test_a_killed_run_ends_with_the_bytes_of_an_uninterrupted_one() -> None:
    """A dozen kills at random instants: same names, same bytes, no stray file after the rerun."""
    script = Path(__file__).with_name("kill.py")
    done = subprocess.run(
        [sys.executable, script, "--kills", "12", "--seed", "5"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed" in done.stdout
