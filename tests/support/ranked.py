"""Runs of several ranks: real processes, forked, that meet as those of torchrun do."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from tests.support.forked import Processes


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def start(
    pipes: Processes, count: int, *arguments: object, others: Sequence[object] = ()
) -> list[int]:
    """The ids of `count` processes that are the ranks of one `pipe` command.

    All but the first may have `others` for arguments.
    """
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        pipes.start(
            *(others if others and rank else arguments),
            **meeting,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(count),
            LOCAL_WORLD_SIZE=str(count),
        )
        for rank in range(count)
    ]


def run(pipes: Processes, count: int, *arguments: object) -> str:
    """What the first rank prints; the others print nothing, and all end well."""
    ids = start(pipes, count, *arguments)
    codes = [pipes.wait(pid) for pid in ids]
    said = [pipes.output(pid) for pid in ids]
    assert codes == [0] * count, said
    assert said[1:] == [""] * (count - 1)
    return _less_schedule(said[0])


def lines(pipes: Processes, ids: Sequence[int]) -> list[tuple[int, str]]:
    """Each rank's exit code, and its lines, less that on the schedule."""
    codes = [pipes.wait(pid) for pid in ids]
    return [(code, _less_schedule(pipes.output(pid))) for code, pid in zip(codes, ids, strict=True)]


def _less_schedule(said: str) -> str:
    kept = [line for line in said.splitlines(keepends=True) if not line.startswith("schedule ")]
    return "".join(kept)
