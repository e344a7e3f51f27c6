"""Which part of a run this process is, where Slurm says so and not the user."""

from __future__ import annotations

from collections.abc import Mapping

from gradpipe.errors import InputError
from gradpipe.store.shard import Shard


def slurm_shard(environ: Mapping[str, str]) -> Shard | None:
    """The shard that a task of a Slurm array is, None outside one.

    Raises InputError if the array's numbers do not follow each other.
    """
    task, count = (environ.get(f"SLURM_ARRAY_TASK_{x}") for x in ("ID", "COUNT"))
    if not (task and count):
        return None
    first = environ.get("SLURM_ARRAY_TASK_MIN") or "0"
    try:
        return Shard.parse(f"{int(task) - int(first)}/{int(count)}")
    except (ValueError, InputError) as error:
        raise InputError(
            f"SLURM_ARRAY_TASK_ID {task}, _COUNT {count}, _MIN {first}: expected numbers that "
            "follow each other: give --shard I/N"
        ) from error
