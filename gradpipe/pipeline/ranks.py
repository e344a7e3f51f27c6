"""Ranks: the processes that torchrun, or srun, starts for one run, and what they tell each other.

RANK and WORLD_SIZE in the environment decide, as torch.distributed has them; without them a process
is the only rank. All that is sent lies on the host: sums that go to whoever encodes them, there,
and short answers. So the backend is gloo, with GPUs too. A rank that ends takes the others with it
at once, as their connections close; one that hangs, or whose host is lost, within a time-out.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from gradpipe.errors import GradpipeError, InputError, Interrupted, one_line
from gradpipe.options import fields_of
from gradpipe.pipeline.launch import Launch
from gradpipe.stages.checkpoint.folder import Checkpoint

T = TypeVar("T")
_PAUSE = 0.01  # seconds between looks at who has come
_LIBRARIES = ("gradpipe", "torch", "transformers", "numpy")  # the result may depend on each


@dataclass(frozen=True, slots=True)
class Ranks:
    """One of `count` processes of a run; all of them make the same calls in the same order."""

    index: int = 0
    count: int = 1
    timeout: int = 0  # seconds to wait for another rank

    @property
    def is_first(self) -> bool:
        """True for the rank that prints, and does what one does for all."""
        return self.index == 0

    def gathered(self, value: T) -> list[T]:
        """What every rank gives, in their order. Raises Interrupted if a rank is lost."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with self._losses():
            dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], T]) -> T:
        """What this rank's work gives; if it fails on any, that rank's error on all."""
        result, error = _outcome(work)
        errors = enumerate(self.gathered(error))
        self._raise(next((found for found in errors if found[1] is not None), None))
        return result  # type: ignore[return-value]  # there was no error

    def first(self, work: Callable[[], T]) -> T:
        """What the first rank's work gives, or its error, on all ranks."""
        outcome = self.gathered(_outcome(work) if self.is_first else (None, None))[0]
        self._raise((0, outcome[1]))
        return outcome[0]  # type: ignore[return-value]  # there was no error

    def _raise(self, found: tuple[int, GradpipeError | None] | None) -> None:
        """Raise a rank's error, which that rank tells."""
        if found is not None and found[1] is not None:
            found[1].is_told = found[0] != self.index
            raise found[1]

    def agree(self, facts: Mapping[str, object]) -> None:
        """Raises InputError, on all ranks, if one has another value somewhere than the first."""
        first, *others = self.gathered({name: str(value) for name, value in facts.items()})
        for index, other in enumerate(others, 1):
            for name in (name for name in first if first[name] != other[name]):
                error = InputError(
                    f"rank {index} has {name} {other[name]:.200}, rank 0 has {first[name]:.200}: "
                    "start all ranks with the same command, files and libraries"
                )
                error.is_told = not self.is_first
                raise error

    def send(self, array: npt.NDArray[Any], to: int) -> None:
        """Hand an array to a rank, which receives it."""
        with self._losses():
            dist.send(torch.from_numpy(np.ascontiguousarray(array)), dst=to)

    def received(self, shape: Sequence[int], of: int, dtype: torch.dtype) -> npt.NDArray[Any]:
        """The array that a rank sends."""
        tensor = torch.empty(tuple(shape), dtype=dtype)
        with self._losses():
            dist.recv(tensor, src=of)
        return np.asarray(tensor.numpy())

    @contextmanager
    def _losses(self) -> Iterator[None]:
        """Raises Interrupted where torch.distributed says that another rank is gone."""
        try:
            yield
        except RuntimeError as error:
            is_late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
            how = f"did not answer in {self.timeout} s" if is_late else "has ended"
            raise Interrupted(f"another rank {how}") from error


def _outcome(work: Callable[[], T]) -> tuple[T | None, GradpipeError | None]:
    try:
        return work(), None
    except GradpipeError as error:
        return None, error


@contextmanager
def joined(timeout: int) -> Iterator[Ranks]:
    """The rank that this process is, connected to the others meanwhile.

    Errors that one rank alone raises name it. Raises InputError if the environment makes no sense.
    """
    launch = Launch.of(os.environ)
    if launch.count == 1:
        yield Ranks()
        return
    ranks = Ranks(launch.index, launch.count, timeout)
    try:
        with ranks._losses():  # noqa: SLF001 (its own)
            _meet(ranks)
        yield ranks
    except GradpipeError as error:
        if not error.is_told:
            error.args = (f"rank {launch.index}: {error}",)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet(ranks: Ranks) -> None:
    """Connect all ranks, by a name of this start of theirs.

    torchrun's store outlives ranks that it starts again: without a name of their own they would
    find the addresses of dead ones in it, and call those until the time-out.
    """
    waiting = timedelta(seconds=ranks.timeout)
    try:
        store, index, count = next(rendezvous("env://", timeout=waiting))
    except ValueError as error:  # MASTER_ADDR or MASTER_PORT is not set, or no number
        raise InputError(
            f"RANK and WORLD_SIZE are set, and ranks cannot meet ({one_line(error)}): start the "
            "command with torchrun, or unset the two"
        ) from error
    name = _greet(store, ranks) if ranks.is_first else _introduce(store, index)
    options = {"store": PrefixStore(name, store), "rank": index, "world_size": count}
    dist.init_process_group("gloo", timeout=waiting, **options)


def _introduce(store: Store, index: int) -> str:
    """Tell the first rank, if it is a living one, that this one is there; the name it gives."""
    own = uuid4().hex
    store.set(f"hello/{index}", own)
    name = str(store.get(f"welcome/{own}").decode())  # waits for it
    store.set(f"thanks/{name}/{index}", "")
    return name


def _greet(store: Store, ranks: Ranks) -> str:
    """Give each rank that is there a new name, until all have answered; dead ones never do."""
    name, missing = uuid4().hex, set(range(1, ranks.count))
    deadline = time.monotonic() + ranks.timeout
    while missing:
        if time.monotonic() > deadline:
            raise RuntimeError("timed out")  # as torch.distributed has it
        for index in missing:
            if store.check([f"hello/{index}"]):
                store.set(f"welcome/{store.get(f'hello/{index}').decode()}", name)
        missing = {x for x in missing if not store.check([f"thanks/{name}/{x}"])}
        time.sleep(_PAUSE)
    return name


def shared_out(costs: Sequence[int], count: int) -> list[int]:
    """For each cost a rank, so that the ranks' totals are about the same: the largest first."""
    totals, owners = [0] * count, [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[item] = totals.index(min(totals))
        totals[owners[item]] += costs[item]
    return owners


def common_facts(config: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """What ranks must have in common before they work: libraries, model, options.

    Paths may differ between hosts; options that are not recorded shape no result.
    """
    facts: dict[str, Any] = {f"{library} version": version(library) for library in _LIBRARIES}
    facts |= {
        "model": checkpoint.label,
        "model revision": checkpoint.revision,
        "config.json's digest": checkpoint.config_digest,
        "tensors' digest": checkpoint.tensors_digest,
    }
    values = [getattr(config, field.name) for field in dataclasses.fields(config)]
    for owner in (config, *(x for x in values if dataclasses.is_dataclass(x))):
        for name, field in fields_of(owner).items():
            if name not in _OF_A_HOST and not field.option.is_argument:
                facts[field.flag] = getattr(owner, name)
    return facts


_OF_A_HOST = (  # may differ between ranks
    *("scratch", "device", "device_map", "workers", "cache", "rank_timeout"),
)
