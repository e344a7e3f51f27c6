"""Mixtures of experts, taken apart: one linear map for each matrix of each expert.

transformers keeps all experts of a block in one parameter for each of their matrices: of three
dimensions, (E, O, I) or (E, I, O), or of two, the experts below each other, as DBRX does.
Collection runs on its slices: every expert's matrix is then a layer like any other, a tensor of the
checkpoint or a part of one, that sees the tokens routed to it and no others. The parameters stay
what and where they are, so that weights are loaded as for any other model.

Three ways to call experts are known. They are given
- tokens, experts and shares: what transformers' own `use_experts_implementation` stands for;
- all tokens once for each expert, those that are not for it zeroed, as in Llama 4;
- rows sorted by expert and the count of each, as in JetMoE: its router knows which tokens they are.
A class that bears no mark of transformers' is tried, small and with random weights: what computes
something else stays as it is.

Shapes: E experts, O outputs and I inputs of a matrix, R tokens routed to one expert.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gradpipe.stages.model import expert_calls
from gradpipe.stages.model.conversion import Sources

_FIRST = (("gate_up_proj",), ("up_proj",), ("w1", "v1"))  # what reads the token
_DOWN = ("down_proj", "w2")
_TRIED = 6  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """One matrix of every expert, in one parameter."""

    owner: nn.Module  # of the parameter
    name: str  # of the parameter in the owner
    path: str  # of the parameter in the model
    count: int  # experts
    transposed: bool  # (I, O) in memory

    def matrix(self, expert: int) -> Tensor:
        """(O, I), in the owner's memory."""
        stack = self.owner.get_parameter(self.name)
        matrix = stack.view(self.count, -1, stack.shape[-1])[expert]
        return matrix.T if self.transposed else matrix

    def bias(self, expert: int) -> Tensor | None:
        """(O,), None without one."""
        bias: Tensor | None = getattr(self.owner, f"{self.name}_bias", None)
        return None if bias is None else bias[expert]


@dataclass(frozen=True, slots=True, kw_only=True)
class InCheckpoint:
    """Where the checkpoint has one expert's matrix, or some rows of it."""

    key: str
    part: tuple[int, int] | None = None  # (index, count): of a tensor that has several experts
    transposed: bool = False  # (I, O) on disk


_Places = list[tuple[InCheckpoint, ...]]  # of each expert, what lies row below row


class RoutedLinear(nn.Module):
    """A linear map over tokens picked from a batch: which ones is its second argument.

    `routed_R` holds their places among the batch's `num_tokens`, in rising order, so that
    whoever listens can tell the samples apart. Its weight is a part of its owner's.
    """

    def __init__(self, stack: Stack, expert: int, rows: slice, place: InCheckpoint) -> None:
        super().__init__()
        self.stack = stack  # not its owner, which PyTorch would take for a child
        self._expert = expert
        self._rows = rows
        self.place = place

    @property
    def weight(self) -> Tensor:
        """(O, I), in the owner's memory."""
        return self.stack.matrix(self._expert)[self._rows]

    def forward(self, x_RI: Tensor, routed_R: Tensor, num_tokens: int) -> Tensor:
        """(R, O)."""
        del routed_R, num_tokens
        bias_O = self.stack.bias(self._expert)
        return linear(x_RI, self.weight, None if bias_O is None else bias_O[self._rows])


class _Expert(nn.Module):
    """The matrices of one expert: what reads a token, then what reads that."""

    def __init__(self, first: list[RoutedLinear], down: list[RoutedLinear]) -> None:
        super().__init__()
        self.first = nn.ModuleList(first)
        self.down = nn.ModuleList(down)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fused:
    """Experts that are one module: their matrices, and a forward that calls one by one."""

    first: tuple[Stack, ...]
    down: tuple[Stack, ...]
    forward: Callable[..., Tensor]


def split_experts(model: nn.Module, sources: Sources) -> None:
    """Let fused experts run one by one, where the checkpoint has them whole and side by side."""
    tried: dict[object, bool] = {}
    for path, module in list(model.named_modules()):
        router = getattr(model.get_submodule(path.rpartition(".")[0]), "router", None)
        fused = _fused(module, path, router)
        if fused is None:
            continue
        places = {x.path: _places(x, sources) for x in (*fused.first, *fused.down)}
        kind = (type(module), *(p.shape for p in module.parameters()))
        if kind not in tried:
            tried[kind] = _computes_the_same(module, fused)
        if all(places.values()) and tried[kind]:
            _split(module, fused, router, places)


def is_split(module: nn.Module) -> bool:
    """True for fused experts that run one by one."""
    return isinstance(getattr(module, "each", None), nn.ModuleList)


def fused_weights(model: nn.Module) -> list[str]:
    """The three-dimensional parameters that hold experts, but for those that run one by one."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3
        and "experts" in name
        and not is_split(model.get_submodule(name.rpartition(".")[0]))
    ]


def _fused(module: Any, path: str, router: Any) -> _Fused | None:
    """The module as fused experts, if its parameters are named and called like them."""
    kept = {name: p for name, p in module.named_parameters() if p.ndim > 1 and "bias" not in name}
    names = {name.rpartition(".")[2]: name for name in kept}
    num_arguments = len(signature(module.forward).parameters)
    if names == {"weight": "weight"} and kept["weight"].ndim == 3 and num_arguments == 2 and router:
        count = len(kept["weight"])
        stack = _stack(module, "weight", path, count, transposed=False)
        return _Fused(first=(stack,), down=(), forward=expert_calls.in_order)
    first = next((x for x in _FIRST if names.keys() - set(_DOWN) == set(x)), ())
    calls: dict[int, Callable[..., Tensor]] = {1: expert_calls.zeroed, 3: expert_calls.routed}
    forward = calls.get(num_arguments)
    if not first or len(names) != len(first) + 1 or forward is None:
        return None
    (down,) = names.keys() - set(first)
    shapes = [tuple(kept[names[x]].shape) for x in (first[0], down)]
    is_flat = len(shapes[0]) == 2  # matrices of both kinds are then (I, H)
    count = getattr(module, "num_experts", 1) if is_flat else shapes[0][0]
    if any(len(x) != len(shapes[0]) or x[0] % count or x[0] == 0 for x in shapes) or count < 2:
        return None
    flip = not is_flat and _is_transposed(module, *shapes)
    return _Fused(
        first=tuple(_stack(module, names[x], path, count, transposed=flip) for x in first),
        down=(_stack(module, names[down], path, count, transposed=flip or is_flat),),
        forward=forward,
    )


def _is_transposed(module: Any, first: tuple[int, ...], down: tuple[int, ...]) -> bool:
    """Whether matrices are (I, O): only so does what a gate lets through differ from its input."""
    is_marked: bool = getattr(module, "is_transposed", False)
    return is_marked or (first[1] == down[2] and first[2] != down[1])


def _stack(module: Any, name: str, path: str, count: int, *, transposed: bool) -> Stack:
    owner, _, leaf = name.rpartition(".")
    return Stack(
        owner=module.get_submodule(owner),
        name=leaf,
        path=f"{path}.{name}",
        count=count,
        transposed=transposed,
    )


def _places(stack: Stack, sources: Sources) -> _Places:
    """Of each expert, what lies row below row; none where the checkpoint has it otherwise."""
    source = sources.by_name[stack.path]
    if one_by_one := source.places():
        is_sound = not stack.transposed
        return [tuple(InCheckpoint(key=x) for x in keys) for keys in one_by_one if is_sound]
    info = sources.checkpoint.tensors[source.keys[0]]
    swapped = source.swaps(info.shape, tuple(stack.owner.get_parameter(stack.name).shape))
    if swapped is None:
        return []
    flip = stack.transposed != swapped
    parts = ((index, stack.count) for index in range(stack.count))
    return [(InCheckpoint(key=info.key, part=part, transposed=flip),) for part in parts]


def _split(module: Any, fused: _Fused, router: Any, places: Mapping[str, _Places]) -> None:
    """Give fused experts a module for each matrix, and a forward that calls them."""

    def matrices(stacks: tuple[Stack, ...], expert: int) -> list[RoutedLinear]:
        return [x for stack in stacks for x in _matrices(stack, expert, places[stack.path][expert])]

    module.each = nn.ModuleList(
        _Expert(matrices(fused.first, index), matrices(fused.down, index))
        for index in range(fused.first[0].count)
    )
    module.sorted_by = (router,)  # in a tuple PyTorch does not take it for a child
    module.forward = MethodType(fused.forward, module)
    if not fused.down:
        router.register_forward_hook(expert_calls.note_routes)


def _matrices(stack: Stack, expert: int, places: tuple[InCheckpoint, ...]) -> list[RoutedLinear]:
    height = len(stack.matrix(expert)) // len(places)
    rows = [slice(i * height, (i + 1) * height) for i in range(len(places))]
    return [RoutedLinear(stack, expert, *x) for x in zip(rows, places, strict=True)]


def _computes_the_same(module: Any, fused: _Fused) -> bool:
    """Whether the experts one by one give what the module does: tried small, on random values.

    What transformers marks is known: its own implementations are run in the place of each other.
    """
    if hasattr(module, "is_concatenated"):
        return True
    try:
        small: Any = _small(module, fused)
        router: Any = nn.Module()
        alike = _fused(small, "", router)
        if alike is None:
            return False
        arguments, router.routes = _random_arguments(alike)
        expected = small(*arguments)
        nowhere: _Places = [(InCheckpoint(key=""),)] * alike.first[0].count
        stacks = (*alike.first, *alike.down)
        _split(small, alike, router, dict.fromkeys((x.path for x in stacks), nowhere))
        found = small(*arguments).reshape(expected.shape)
        return torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    except Exception:  # noqa: BLE001 (it may want other arguments)
        return False


def _small(module: nn.Module, fused: _Fused) -> Any:
    """A copy of experts with fewer rows and columns, in the same proportions, of random weights."""
    stacks, count = (*fused.first, *fused.down), fused.first[0].count
    step = math.gcd(*(size for stack in stacks for size in stack.matrix(0).shape))

    def less(size: int) -> int:
        return size if size % step or size == count else 4 * size // step

    generator = torch.Generator().manual_seed(1)
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.randn([*map(less, p.shape)], generator=generator))
        for p in module.parameters()
    }
    small = copy.deepcopy(module, memo)
    for part in small.modules():
        for name, value in vars(part).items():
            if type(value) is int and value > 0:
                setattr(part, name, less(value))
    return small


def _random_arguments(fused: _Fused) -> tuple[tuple[Any, ...], tuple[Tensor, int]]:
    """What to call experts with, and what a router notes: the token of each row, and T."""
    count, width = fused.first[0].count, fused.first[0].matrix(0).shape[1]
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(_TRIED, width, generator=generator)
    experts_TK = torch.rand(_TRIED, count, generator=generator).topk(2).indices
    shares_TK = torch.rand(experts_TK.shape, generator=generator)
    rows_S = torch.randperm(_TRIED, generator=generator)
    if fused.forward is expert_calls.in_order:
        counts = [_TRIED - 2, 2] + [0] * (count - 2)
        return (x_TH[rows_S], counts), (rows_S, _TRIED)
    if fused.forward is expert_calls.routed:
        return (x_TH, experts_TK, shares_TK), (rows_S, _TRIED)
    shares_TE = torch.zeros(_TRIED, count).scatter(1, experts_TK, shares_TK)
    return ((shares_TE.T[..., None] * x_TH).flatten(0, 1),), (rows_S, _TRIED)
