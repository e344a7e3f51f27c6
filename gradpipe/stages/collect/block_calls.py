"""How a model calls its blocks, learnt from the model's own forward, and how to call them alone.

In a recording pass no block computes: each notes what it is called with, and answers with
placeholders shaped as its real answer. What blocks are called with is then known to come from one
of three places: an answer of an earlier block (the very placeholder comes back), the micro-batch
(it differs between micro-batches), or neither. Anything else is refused, because a block could not
be run again as the model runs it: a tensor that the model computes from an answer (it differs when
the placeholders have another value), an argument that is no tensor and depends on the samples, a
block that does not run, or not in turn.

What a block puts into a mapping that it is given (keys and values for later blocks) is part of its
answer. Tensors of answers are named `3.0`: the first one that block 3 gives.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradpipe.errors import GradpipeError
from gradpipe.stages.collect.hooks import never_ran
from gradpipe.stages.collect.trees import Place, equal, leaves, mappings, replaced
from gradpipe.stages.model.batch import Batch
from gradpipe.stages.model.blocks import Blocks

_Handle = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a placeholder must be like."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a block returns, and what it puts into the mappings that it is given."""

    tree: Any  # (returned, [what is put]), with `_Kind`s for tensors
    targets: tuple[tuple[Place, Any], ...]  # the mapping and the key of each thing that is put

    def kinds(self) -> list[tuple[Place, _Kind]]:
        return [(place, leaf) for place, leaf in leaves(self.tree) if isinstance(leaf, _Kind)]

    def given(self, tensors: Sequence[Tensor], call: tuple[Any, ...]) -> Any:
        """What the block would return, if these were its tensors; put into `call` what it puts."""
        places = [place for place, _ in self.kinds()]
        returned, put = replaced(self.tree, dict(zip(places, tensors, strict=True)))
        for (place, key), value in zip(self.targets, put, strict=True):
            _at(call, place)[key] = value
        return returned


@dataclass(frozen=True, slots=True)
class _Call:
    """How the model calls one block."""

    tree: Any  # (args, kwargs)
    names: dict[str, Place]  # of the tensors that come from no block: `3:1` -> place
    carried: dict[Place, str]  # where tensors of earlier blocks go
    answer: _Answer


class _Stop(Exception):  # noqa: N818 (it reports success: the rest of the pass is not needed)
    pass


class BlockCalls:
    """The calls of a model's blocks, for micro-batches of each size."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        load: Callable[[int], AbstractContextManager[None]],
        device: torch.device,
    ) -> None:
        """`load` gives a block its weights for a while; nothing is known yet."""
        self._model = model
        self._blocks = [model.get_submodule(path) for path in blocks.paths]
        self._paths = blocks.paths
        self._load = load
        self._device = device
        self._calls: dict[int, list[_Call]] = {}  # by the micro-batch's size
        self._answers: dict[str, _Answer] = {}  # of blocks that are alike and called alike

    def knows(self, size: int) -> bool:
        """Whether a micro-batch of that size has been recorded."""
        return size in self._calls

    def record(self, batch: Batch) -> dict[str, Tensor]:
        """Learn from one micro-batch; returns its arguments that the first of its size had not.

        Raises GradpipeError, with the block's path, for a call that cannot be made again.
        """
        calls = self._pass(batch)
        if len(batch) not in self._calls:
            self._calls[len(batch)] = calls
            self._check_uncomputed(batch)
        first = self._calls[len(batch)]
        different: dict[str, Tensor] = {}
        for path, known, call in zip(self._paths, first, calls, strict=True):
            different |= _differences(path, known, call)
        carried = [call.carried for call in next(iter(self._calls.values()))]
        if carried != [call.carried for call in calls]:
            raise GradpipeError(
                f"blocks {self._paths[0]} and later hand on other things in each micro-batch: "
                "use --schedule resident"
            )
        return different

    def _check_uncomputed(self, batch: Batch) -> None:
        """Raises GradpipeError for an argument that differs where only the placeholders do."""
        calls = zip(self._paths, self._calls[len(batch)], self._pass(batch, fill=1), strict=True)
        for path, zeros, ones in calls:
            if _differences(path, zeros, ones):
                raise GradpipeError(
                    f"block {path} is called with what the model computes from an earlier block's "
                    "output: use --schedule resident"
                )

    def outside(self, batch: Batch) -> dict[str, Tensor]:
        """The arguments of a micro-batch that require a gradient: layers before the blocks do."""
        calls = self._pass(batch)
        places = [(call, name, place) for call in calls for name, place in call.names.items()]
        tensors = {name: _at(call.tree, place) for call, name, place in places}
        return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}

    def carried(self, boundary: int) -> tuple[str, ...]:
        """Names of the tensors of earlier blocks that blocks from `boundary` on are called with.

        At the last boundary, before the head, all that the last block gives.
        """
        calls = next(iter(self._calls.values()))
        if boundary == len(calls):
            return tuple(_names(boundary - 1, calls[-1].answer))
        wanted = [name for call in calls[boundary:] for name in call.carried.values()]
        return tuple(x for x in dict.fromkeys(wanted) if int(x.partition(".")[0]) < boundary)

    def arguments(self, index: int, size: int) -> list[str]:
        """Names of a block's arguments that come from no block."""
        return list(self._calls[size][index].names)

    def constant(self, size: int, name: str) -> Tensor:
        """An argument by its name, as in the first micro-batch of that size."""
        call = self._calls[size][int(name.partition(":")[0])]
        tensor: Tensor = _at(call.tree, call.names[name])
        return tensor

    def run(self, index: int, size: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What block `index`, its weights loaded, gives: its tensors by name.

        `tensors` are those of earlier blocks, and the arguments that differ from the first
        micro-batch's, by name. Raises GradpipeError if the block answers otherwise than it should.
        """
        call = self._calls[size][index]
        new = {place: tensors[name] for place, name in call.carried.items()}
        new |= {place: tensors[name] for name, place in call.names.items() if name in tensors}
        answer, found = _called(self._blocks[index], *replaced(call.tree, new))
        if answer != call.answer:
            raise GradpipeError(
                f"block {self._paths[index]} answers otherwise than blocks like it: use "
                "--schedule resident"
            )
        return dict(zip(_names(index, answer), found, strict=True))

    @contextmanager
    def answered(self, size: int, tensors: Mapping[str, Tensor]) -> Iterator[list[Tensor]]:
        """Meanwhile the last block answers with `tensors`, and all others with placeholders.

        Yields the placeholders, which nothing may be computed from.
        """
        held: list[Tensor] = []
        last = len(self._blocks) - 1

        def answer(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            """What a block gives in place of running."""
            expected = self._calls[size][index].answer
            if index == last:
                found = [tensors[name] for name in _names(index, expected)]
            else:
                found = self._placeholders(expected)
                for tensor in found:
                    tensor.requires_grad_(tensor.is_floating_point())
                held.extend(found)
            return expected.given(found, (args, kwargs))

        with self._replaced(answer):
            yield held

    def _pass(self, batch: Batch, *, fill: int = 0) -> list[_Call]:
        """The calls of one pass of the model up to the last block, placeholders of one value."""
        known = self._calls.get(len(batch))
        calls: list[_Call] = []
        given: list[tuple[Tensor, str]] = []  # tensors are held, so that no id is used twice

        def note(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            """Keep how a block is called, and answer with placeholders."""
            if index != len(calls):
                raise GradpipeError(
                    f"block {self._paths[index]} runs out of turn, expected "
                    f"{self._paths[len(calls)]}: use --schedule resident, or name other blocks "
                    "by --blocks"
                )
            tree, names, carried = self._sources(index, (args, kwargs), given)
            expected = known[index].answer if known else self._answer(index, args, kwargs)
            calls.append(_Call(tree, names, carried, expected))
            if len(calls) == len(self._blocks):
                raise _Stop
            found = self._placeholders(expected, fill)
            given.extend(zip(found, _names(index, expected), strict=True))
            return expected.given(found, (args, kwargs))

        with self._replaced(note), suppress(_Stop), torch.enable_grad():
            batch.forward(self._model)
        if len(calls) < len(self._blocks):
            raise GradpipeError(never_ran(self._paths[len(calls)]))
        return calls

    def _sources(
        self, index: int, call: tuple[Any, ...], given: list[tuple[Tensor, str]]
    ) -> tuple[Any, dict[str, Place], dict[Place, str]]:
        """A call without the tensors of earlier blocks, the names of others, and those by place."""
        known = {_memory(tensor): name for tensor, name in given}
        names, carried = {}, {}
        for number, (place, leaf) in enumerate(leaves(call)):
            if isinstance(leaf, Tensor) and _memory(leaf) in known:
                carried[place] = known[_memory(leaf)]
            elif isinstance(leaf, Tensor):
                names[f"{index}:{number}"] = place
        if index and not any(name.startswith(f"{index - 1}.") for name in carried.values()):
            raise GradpipeError(
                f"block {self._paths[index]} is not called with what {self._paths[index - 1]} "
                "gives: use --schedule resident"
            )
        return replaced(call, dict.fromkeys(carried)), names, carried

    def _answer(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Answer:
        """What a block gives: it is run, unless one like it has been called like it."""
        block = self._blocks[index]
        key = _signature(block, index, (args, kwargs))
        if key not in self._answers:
            stub = block.__dict__.pop("forward")
            with self._load(index), torch.no_grad():
                self._answers[key], _ = _called(block, *replaced((args, kwargs), {}))
            block.forward = stub
        return self._answers[key]

    def _placeholders(self, answer: _Answer, fill: int = 0) -> list[Tensor]:
        """Tensors as a block would give, each a new one, to be known again."""
        kinds = [kind for _, kind in answer.kinds()]
        return [torch.full(x.shape, fill, dtype=x.dtype, device=self._device) for x in kinds]

    @contextmanager
    def _replaced(self, handle: _Handle) -> Iterator[None]:
        """Blocks call `handle` in place of their own forward."""
        for index, block in enumerate(self._blocks):
            block.forward = _stub(index, handle)
        try:
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """Blocks compute again."""
        for block in self._blocks:
            block.__dict__.pop("forward", None)


def _stub(index: int, handle: _Handle) -> Callable[..., Any]:
    return lambda *args, **kwargs: handle(index, args, kwargs)


def _names(index: int, answer: _Answer) -> list[str]:
    return [f"{index}.{number}" for number in range(len(answer.kinds()))]


def _called(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[_Answer, list[Tensor]]:
    """Run a block: what its answer is like, and the tensors in it."""
    before = {place: dict(mapping) for place, mapping in mappings((args, kwargs)) if len(place) > 1}
    given = [leaf for _, leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    versions = [leaf._version for leaf in given]  # noqa: SLF001
    returned = block(*args, **kwargs)
    if [leaf._version for leaf in given] != versions:  # noqa: SLF001
        raise GradpipeError(
            f"blocks of class {type(block).__name__} change a tensor that they are called with: "
            "use --schedule resident"
        )
    put = {
        (place, key): value
        for place, mapping in mappings((args, kwargs))
        for key, value in mapping.items()
        if place in before and before[place].get(key) is not value
    }
    tree = (returned, list(put.values()))
    found = [(place, leaf) for place, leaf in leaves(tree) if isinstance(leaf, Tensor)]
    kinds = {place: _Kind(tuple(leaf.shape), leaf.dtype) for place, leaf in found}
    return _Answer(replaced(tree, kinds), tuple(put)), [leaf for _, leaf in found]


def _memory(tensor: Tensor) -> Any:
    """Equal for a tensor and for a view of all of it."""
    if not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _at(tree: Any, place: Place) -> Any:
    for step in place:
        tree = tree[step]
    return tree


def _differences(path: str, known: _Call, call: _Call) -> dict[str, Tensor]:
    """Tensors that a call has otherwise than the known one."""
    mine, theirs = dict(leaves(call.tree)), dict(leaves(known.tree))
    odd = [place for place in mine if place not in theirs or not equal(mine[place], theirs[place])]
    places = {place: name for name, place in call.names.items()}
    if mine.keys() != theirs.keys() or not places.keys() >= set(odd):
        raise GradpipeError(
            f"block {path} is called with something that depends on the samples and is no tensor: "
            "use --schedule resident"
        )
    return {places[place]: mine[place] for place in odd}


def _signature(block: nn.Module, index: int, call: tuple[Any, ...]) -> str:
    """Equal for blocks that are alike and called alike: they give alike answers."""
    parts: list[Any] = []
    for name, module in block.named_modules():
        plain = {k: _normal(k, v, index) for k, v in vars(module).items() if _is_plain(v)}
        shapes = [(n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False)]
        parts.append((name, type(module).__qualname__, sorted(plain.items(), key=str), shapes))
    for place, leaf in leaves(call):
        shape = (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else type(leaf)
        parts.append((place, leaf if _is_plain(leaf) and leaf != index else shape))
    return repr(parts)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _normal(name: str, value: Any, index: int) -> Any:
    """A block's own number is no difference."""
    is_number = type(value) is int and value == index and ("idx" in name or "layer" in name)
    return "own" if is_number else value
