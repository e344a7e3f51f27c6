"""Requests to stop, by a person and by a scheduler."""

import os
import signal

import pytest

from gradpipe.pipeline.interrupt import stop_requests


def test_a_second_sigterm_is_the_first_one_again() -> None:
    """A scheduler and torchrun send one each, at any distance; a person's Ctrl-C quits at once."""
    with stop_requests() as stop_requested:
        assert not stop_requested()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop_requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
