"""What runs in each phase of a command: the owner and the name of a function.

The one place where tests name private functions, to interrupt a run inside them: a function that
moves is one edit here. Listed from the outer to the inner phase: while an inner one runs, its phase
is the phase.
"""

from collections.abc import Mapping
from typing import Any

import gradpipe.pipeline.collect.begin
import gradpipe.pipeline.collect.run
import gradpipe.pipeline.collect.worker
import gradpipe.pipeline.prune.run
import gradpipe.pipeline.prune.staging
import gradpipe.stages.collect.streamed
import gradpipe.store.writer

PHASES: Mapping[str, tuple[Any, str]] = {
    "tokenising": (gradpipe.pipeline.collect.begin, "_draw"),
    "beginning": (gradpipe.store.writer.StoreWriter, "begin"),
    "loading": (gradpipe.pipeline.collect.worker, "load_model"),
    "accumulating": (gradpipe.pipeline.collect.worker, "resident_batch"),
    "snapshotting": (gradpipe.pipeline.collect.worker, "_save"),
    "finalising": (gradpipe.pipeline.collect.worker, "_finish"),
    "merging": (gradpipe.pipeline.collect.run, "finalize"),
    "streaming": (gradpipe.pipeline.collect.worker, "_stream"),
    "streaming forward": (gradpipe.stages.collect.streamed.Streamed, "_forward"),
    "streaming the head": (gradpipe.stages.collect.streamed.Streamed, "_run_head"),
    "streaming backward": (gradpipe.stages.collect.streamed.Streamed, "_run_block"),
    "writing a layer": (gradpipe.store.writer.StoreWriter, "write_encoded"),
    "committing": (gradpipe.store.writer.StoreWriter, "commit"),
    "tidying": (gradpipe.store.writer, "tidy"),
    "pruning": (gradpipe.pipeline.prune.run, "write_file"),
    "reporting": (gradpipe.pipeline.prune.run, "finish"),
    "publishing": (gradpipe.pipeline.prune.staging.Places, "publish"),
}
