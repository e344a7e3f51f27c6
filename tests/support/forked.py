"""Real `pipe` processes without the seconds that imports take: a server imports once, then forks.

    python tests/forked.py      requests on stdin, answers on stdout, one JSON document a line

A child is a process like any other: it has its own id, signals, exit code and output file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Processes:
    """Starts processes through one server."""

    def __init__(self, server: subprocess.Popen[str], logs: Path) -> None:
        """Use `processes`."""
        self._server = server
        self._logs = logs

    def start(self, *arguments: object, **variables: str) -> int:
        """The id of a new process that runs `pipe` with these arguments and variables."""
        log = str(self._logs / str(time.monotonic_ns()))
        pid = self._ask(arguments=list(map(str, arguments)), variables=variables, log=log)
        (self._logs / str(pid)).symlink_to(log)
        return int(pid)

    def wait(self, pid: int) -> int:
        """Its exit code, negative if a signal ended it."""
        return int(self._ask(wait=pid))

    def output(self, pid: int) -> str:
        """What it printed, on stdout and stderr."""
        return (self._logs / str(pid)).read_text()

    def is_alive(self, pid: int) -> bool:
        """False once it has ended, waited for or not."""
        state = Path(f"/proc/{pid}/stat")
        return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"

    def _ask(self, **request: object) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


@contextmanager
def processes(logs: Path) -> Iterator[Processes]:
    """A server, and its end."""
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            yield Processes(server, logs)
        finally:
            assert server.stdin is not None
            server.stdin.close()


def _serve() -> None:
    import torch  # noqa: PLC0415 (the server alone needs all of these)
    import transformers.models.llama.modeling_llama  # noqa: F401, PLC0415

    import gradpipe.pipeline.collect.run  # noqa: PLC0415
    import gradpipe.pipeline.prune.run  # noqa: F401, PLC0415
    from gradpipe.__main__ import main  # noqa: PLC0415

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork() or _run(main, request)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def _run(main: Any, request: Any) -> int:
    """Become a `pipe` process."""
    code = 99
    try:
        with Path(request["log"]).open("wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.environ.update(request["variables"])
        sys.argv = ["pipe", *request["arguments"]]
        main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001 (nothing may return into the server's code)
        traceback.print_exc()
    else:
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
