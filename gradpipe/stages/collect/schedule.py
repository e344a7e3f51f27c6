"""What both schedules have in common: the face that a worker drives, and what sums they give out.

A schedule runs a worker's samples through a model and gives out finished pieces of its work, each
a `Part` with its sums. `Resident` takes all layers at once, over more and more samples; `Streamed`
takes one block at a time, over all samples.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from gradpipe.errors import InputError
from gradpipe.stages.collect.sums import LayerAccumulator
from gradpipe.stages.model.skeleton import Skeleton

_SAMPLES, _BLOCK, _OUTSIDE = "samples", "block", "outside"
_DIGITS = {_SAMPLES: 8, _BLOCK: 4, _OUTSIDE: 0}


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a worker's work that is saved as one."""

    kind: str
    index: int = 0

    @classmethod
    def of_samples(cls, count: int) -> Self:
        """All layers, over the worker's first `count` samples."""
        return cls(_SAMPLES, count)

    @classmethod
    def of_block(cls, block: int | None) -> Self:
        """The layers of one block, or those outside the blocks (None), over all samples."""
        return cls(_OUTSIDE) if block is None else cls(_BLOCK, block)

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """The part of that name, None if it is none's."""
        kind, _, digits = name.partition("-")
        if kind not in _DIGITS or len(digits) != _DIGITS[kind] or not (digits or "0").isdecimal():
            return None
        return cls(kind, int(digits or 0))

    @property
    def name(self) -> str:
        """Its name on disk: `samples-00000004`, `block-0003`, `outside`."""
        digits = _DIGITS[self.kind]
        return f"{self.kind}-{self.index:0{digits}d}" if digits else self.kind

    @property
    def is_cumulative(self) -> bool:
        """True if it holds all that parts before it hold: the newest alone counts."""
        return self.kind == _SAMPLES


class Schedule(Protocol):
    """The face of a schedule."""

    is_cumulative: bool  # its parts are; else each is of other layers, and all of them count
    unit: str  # of what `advance` counts
    num_steps: int  # how many of them there are

    @property
    def restorable(self) -> Sequence[LayerAccumulator]:
        """Of one that is cumulative: the sums, to be filled from what is saved before `run`."""

    def run(
        self, done: frozenset[Part], advance: Callable[[int], None]
    ) -> Iterator[tuple[Part, list[LayerAccumulator]]]:
        """Give out each part that is not in `done`, and its sums.

        `advance` hears of each micro-batch, and may raise to stop.
        """


def check_shared(skeleton: Skeleton) -> None:
    """Raises InputError for a layer whose module is part of several blocks."""
    model, found = skeleton.model, set[str]()
    for path in skeleton.blocks.paths:
        modules = set(model.get_submodule(path).modules())
        inside = {x.path for x in skeleton.layers if model.get_submodule(x.path) in modules}
        if inside & found:
            raise InputError(runs_twice(min(inside & found)))
        found |= inside


def runs_twice(layer: str) -> str:
    """What to say of a layer whose gradient is not one product."""
    return (
        f"layer {layer} runs twice in one pass (shared weights): leave it out by --exclude, or "
        "name blocks without it by --blocks; a model that shares a block is not supported"
    )
