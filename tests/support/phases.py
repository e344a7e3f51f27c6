"""What runs in each phase of a command: the owner and the name of a function.

The one place where tests name private functions, to interrupt a run inside them: a function that
moves is one edit here. Listed from the outer to the inner phase: while an inner one runs, its phase
is the phase.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest

import gradpipe.pipeline.collect.begin
import gradpipe.pipeline.collect.resume
import gradpipe.pipeline.collect.run
import gradpipe.pipeline.prune.run
import gradpipe.pipeline.prune.staging
import gradpipe.pipeline.ranks
import gradpipe.stages.collect.resident
import gradpipe.stages.collect.streamed
import gradpipe.store.writer

PHASES: Mapping[str, tuple[Any, str]] = {
    "tokenising": (gradpipe.pipeline.collect.begin, "_draw"),
    "beginning": (gradpipe.store.writer.StoreWriter, "begin"),
    "loading": (gradpipe.stages.collect.resident, "load_model"),
    "accumulating": (gradpipe.stages.collect.resident, "resident_batch"),
    "snapshotting": (gradpipe.pipeline.collect.resume.BySamples, "_write"),
    "finalising": (gradpipe.pipeline.collect.resume.BySamples, "finish"),
    "merging": (gradpipe.pipeline.collect.run, "finalize"),
    "recording calls": (gradpipe.stages.collect.streamed.Streamed, "record"),
    "streaming forward": (gradpipe.stages.collect.streamed.Streamed, "_forward"),
    "streaming the head": (gradpipe.stages.collect.streamed.Streamed, "_run_head"),
    "streaming backward": (gradpipe.stages.collect.streamed.Streamed, "_run_block"),
    "finishing from blocks": (gradpipe.pipeline.collect.resume.ByBlocks, "finish"),
    "writing a layer": (gradpipe.store.writer.StoreWriter, "write_encoded"),
    "sending": (gradpipe.pipeline.ranks.Ranks, "send"),
    "receiving": (gradpipe.pipeline.ranks.Ranks, "received"),
    "committing": (gradpipe.store.writer.StoreWriter, "commit"),
    "tidying": (gradpipe.store.writer, "tidy"),
    "pruning": (gradpipe.pipeline.prune.run, "write_file"),
    "reporting": (gradpipe.pipeline.prune.run, "finish"),
    "publishing": (gradpipe.pipeline.prune.staging.Beside, "publish"),
}


def interfere(
    patched: pytest.MonkeyPatch, phase: str, act: Callable[[], object], *, after: bool = False
) -> None:
    """Do something each time before, or after, what runs in a phase."""
    owner, name = PHASES[phase]
    step = getattr(owner, name)

    def interfered(*arguments: Any, **options: Any) -> Any:
        if not after:
            act()
        result = step(*arguments, **options)
        if after:
            act()
        return result

    patched.setattr(owner, name, interfered)


def raising(error: Exception, after: int = 0) -> Callable[[], None]:
    """What raises an error when it is called once more than so often."""
    calls = itertools.count()

    def act() -> None:
        if next(calls) >= after:
            raise error

    return act
