"""A model that runs without its weights: to see where tensors go, not what is in them.

Linear maps return made-up outputs, whatever they read. So no product is computed and no weight is
kept, and a change of one map's outputs stops at the next maps: what moves there is what flows there
directly. All else runs as the model's authors wrote it, on the CPU and in float64.

Shapes: N rows of the batch, each a sequence of its own; O outputs, I inputs of a linear map.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from gradpipe.stages.model.experts import fused_weights, is_split
from gradpipe.stages.model.linear import linear_maps
from gradpipe.stages.model.trial import image_shape

_LARGE = 2**22  # values of a parameter; larger ones get one row's memory


Call = tuple[tuple[Any, ...], Mapping[str, Any]]  # what a block was called with


class StandIn:
    """A copy of a model with made-up outputs: in each row the same, but for `shifts`.

    All positions of a row get the same outputs, and a text is one token: softmax attention is then
    even whatever the queries and keys are, so that values go through it alone. Outputs lie in
    [0.5, 1.5], where no common activation is flat.
    """

    def __init__(self, model: nn.Module, num_rows: int, like: Mapping[str, str]) -> None:
        """`like` has the path of each block -> that of the block which runs in its place."""
        self.num_rows = num_rows
        self.seed = 0  # of the made-up outputs: another seed, others
        self.shifts: Mapping[str, Tensor] = {}  # path of a linear map -> what to add, (N, O)
        self.inputs: dict[str, Tensor] = {}  # path -> what it has read last, in order
        self.model: Any = _copied(model, like).double()
        self._maps = linear_maps(self.model)
        for number, (path, module) in enumerate(self._maps.items()):
            weight: Any = module.weight
            width = int(weight.shape[1 if isinstance(module, Conv1D) else 0])
            module.forward = partial(self._map, path, number, width)
        for owner in {name.rpartition(".")[0] for name in fused_weights(self.model)}:
            self.model.get_submodule(owner).forward = lambda x, *_, **__: torch.ones_like(x)
        self._fill_in()
        for module in self.model.modules():
            if is_split(module):
                module.register_forward_pre_hook(_to_every_expert)

    def calls(self, paths: Iterable[str]) -> dict[str, Call]:
        """Run the model, and each of the blocks at `paths` once: what they were called with.

        Not all of them are there where the model's code raises.
        """
        found: dict[str, Call] = {}
        blocks = {self.model.get_submodule(path): path for path in paths}
        for block, path in blocks.items():
            block.forward = _once(path, block.forward, found)
        with _running(), _short_chunks(self.model):
            self.model(**self._batch())
        for block in blocks:
            del block.forward
        return found

    def run(self, path: str, call: Call) -> dict[str, Tensor]:
        """Run one module as it was called: path -> input of each linear map that it reached."""
        self.inputs = {}
        module = self.model.get_submodule(path)
        with _running(), _short_chunks(module):
            module(*call[0], **call[1])
        return self.inputs

    def _batch(self) -> dict[str, Any]:
        if self.model.main_input_name == "pixel_values":
            return {"pixel_values": torch.zeros(self.num_rows, *image_shape(self.model)).double()}
        ids_N1 = torch.ones(self.num_rows, 1, dtype=torch.long)
        return {"input_ids": ids_N1, "use_cache": False}

    def _map(self, path: str, number: int, width: int, x: Tensor, *_: Any) -> Tensor:
        """Stands in for the map's `forward`: (..., I) -> (..., O)."""
        self.inputs[path] = x
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + number)
        base_O = 0.5 + torch.rand(width, generator=generator, dtype=torch.float64)
        output = base_O.repeat(*x.shape[:-1], 1)
        if path not in self.shifts:
            return output
        by_row = output.reshape(self.num_rows, output[..., 0].numel() // self.num_rows, width)
        return (by_row + self.shifts[path][:, None]).view(output.shape)

    def _fill_in(self) -> None:
        """Give values to all that has none: norms, convolutions, embeddings, buffers of weights.

        Those of one shape share their memory. So do the rows of an embedding, and of a map, whose
        weight is read only by code that goes round the map.
        """
        generator = torch.Generator().manual_seed(0)
        known: dict[tuple[bool, torch.Size], Tensor] = {}
        maps = set(self._maps.values())
        for module in self.model.modules():
            is_map = isinstance(module, nn.Embedding) or module in maps
            tensors = [
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ]
            for name, old in tensors:
                if not old.is_meta:
                    continue
                is_one_row = is_map or old.numel() > _LARGE
                key = (is_one_row, old.shape)
                if key not in known:
                    shape = old.shape[-1:] if is_one_row else old.shape
                    values = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
                    known[key] = values.expand(old.shape)
                new = known[key].to(old.dtype)
                is_weight = isinstance(old, nn.Parameter)
                setattr(module, name, nn.Parameter(new, requires_grad=False) if is_weight else new)


def _copied(model: nn.Module, like: Mapping[str, str]) -> nn.Module:
    """A copy in which blocks are one module that runs in the place of several."""
    memo: dict[int, Any] = {}
    for path, other in like.items():
        stand_in = copy.deepcopy(model.get_submodule(other), memo)
        memo[id(model.get_submodule(path))] = stand_in
    return copy.deepcopy(model, memo)


def _once(path: str, forward: Callable[..., Any], found: dict[str, Call]) -> Callable[..., Any]:
    """A block's `forward` that records its first call, and repeats its output for the others."""
    outputs: list[Any] = []

    def first(*args: Any, **kwargs: Any) -> Any:
        if not outputs:
            found[path] = (args, kwargs)
            outputs.append(forward(*args, **kwargs))
        return outputs[0]

    return first


def _to_every_expert(experts: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Show each expert all tokens: routes of another model's code are left alone."""
    if len(args) != 3:
        return args
    every_TE = torch.arange(len(experts.each)).expand(len(args[0]), -1)
    return args[0], every_TE, torch.ones(every_TE.shape, dtype=torch.float64)


class _Doubled(TorchFunctionMode):
    """Reads float32 as float64: too coarse for differences, it is what norms are computed in."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        func = Tensor.double if func is Tensor.float else func
        named = {name: _doubled(value) for name, value in (kwargs or {}).items()}
        return func(*map(_doubled, args), **named)


def _doubled(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def _short_chunks(model: nn.Module) -> Iterator[None]:
    """Linear attention takes chunks of one token, which a text is, and does not fill up 64.

    transformers' reference code has the length as a default; of Kimi Linear's, a chunk of 64 takes
    gigabytes. What is computed is the same.
    """
    files = {type(module).__module__ for module in model.modules()}
    modules = [sys.modules[file] for file in files if file in sys.modules]
    named = [x for file in modules for x in vars(file).values() if inspect.isfunction(x)]
    functions = {x for x in map(inspect.unwrap, named) if inspect.isfunction(x)}
    with ExitStack() as changed:
        for function in functions:
            defaults = function.__defaults__ or ()
            code = function.__code__
            names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
            if "chunk_size" in names:
                changed.callback(setattr, function, "__defaults__", defaults)
                pairs = zip(names, defaults, strict=True)
                function.__defaults__ = tuple(1 if n == "chunk_size" else x for n, x in pairs)
        yield


@contextmanager
def _running() -> Iterator[None]:
    """What a model's code raises is no error: what has run until then is known."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with suppress(Exception), torch.no_grad(), _Doubled():
            yield
    finally:
        torch.set_default_dtype(default)
