"""Which part of a run this process is, where a launcher says so and not the user.

A rank is one of the processes that torchrun starts for a single run (RANK, WORLD_SIZE, LOCAL_RANK
and LOCAL_WORLD_SIZE in the environment, as torch.distributed reads them); a shard is an independent
job, such as a task of a Slurm array.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from gradpipe.errors import InputError
from gradpipe.store.shard import Shard


@dataclass(frozen=True, slots=True)
class Launch:
    """What a launcher says of a rank."""

    index: int = 0
    count: int = 1
    local_index: int = 0  # among those of its host
    local_count: int = 1
    is_restart: bool = False  # torchrun started the ranks again, after one was lost

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Self:
        """What the environment says; InputError if its numbers make no sense."""
        if not (environ.get("RANK") and environ.get("WORLD_SIZE")):
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        texts = [environ.get(name, default) for name, default in zip(names, "0101", strict=True)]
        is_odd = not all(text.isdecimal() for text in texts) or int(texts[3]) < 1
        if is_odd or int(texts[0]) >= int(texts[1]):
            told = ", ".join(f"{name} {text}" for name, text in zip(names, texts, strict=True))
            raise InputError(f"{told}: expected ranks from 0: start the command with torchrun")
        index, count, local_index, local_count = map(int, texts)
        is_restart = environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        return cls(index, count, local_index, local_count, is_restart)

    def device(self, asked: str, num_gpus: int) -> str:
        """The device for a rank: of `auto` and `cuda`, the GPU of its number on its host.

        Raises InputError if the host has fewer GPUs than ranks.
        """
        if self.count == 1 or asked not in {"auto", "cuda"} or (asked == "auto" and not num_gpus):
            return asked
        if self.local_index >= num_gpus:
            raise InputError(
                f"LOCAL_RANK {self.local_index}: this host has {num_gpus} GPUs: start one rank for "
                "each, or give --device"
            )
        return f"cuda:{self.local_index}"


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
