"""Scores as formulas: `abs(W) * (a*G + X)`, parsed into a tree that is walked, never evaluated.

    W       the weights, (O, I)
    X       ‖X‖₂ of each input, (I,)
    G1, G2  ‖G‖₁ and ‖G‖₂ over samples, (O, I)
    GS      ΣG over samples, with its sign, (O, I)
    G       the one of these three that --grad-norm names; |GS| for `sum`
    a       --alpha
    ri(W)   relative importance: |W| / Σ of its row's + |W| / Σ of its column's (RIA)

with numbers, + - * / **, parentheses, abs, sqrt and log. Shapes: O out, I in.
"""

from __future__ import annotations

import ast
import math
import operator
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TypeGuard

from gradpipe.errors import InputError, did_you_mean
from gradpipe.store.statistics import IN, OUT, STATISTICS, letters

if TYPE_CHECKING:
    from torch import Tensor  # a formula is checked without torch

_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}

_UNARY: Mapping[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}

_MAX_CHARACTERS = 500
_SMALLEST = 2.0**-126  # float32's smallest normal number


def relative_importance(weight_OI: Tensor) -> Tensor:
    """|W_ij| / Σ_j|W_ij| + |W_ij| / Σ_i|W_ij| (RIA: Zhang et al., 2024); 0 where a sum is 0."""
    size_OI = weight_OI.float().abs()
    rows_O1 = size_OI.sum(dim=1, keepdim=True).clamp_min(_SMALLEST)
    columns_I = size_OI.sum(dim=0).clamp_min(_SMALLEST)
    return size_OI / rows_O1 + size_OI / columns_I


_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "abs": lambda x: x.float().abs(),
    "sqrt": lambda x: x.sqrt(),
    "log": lambda x: x.log(),
    "ri": relative_importance,
}

_OF_NUMBERS: Mapping[str, Callable[[float], float]] = {
    "abs": abs,
    "sqrt": math.sqrt,
    "log": math.log,
}


@dataclass(frozen=True, slots=True)
class Expression:
    """A formula that has been checked."""

    text: str
    names: frozenset[str]
    tree: ast.expr = field(compare=False, repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The formula in `text`; InputError says what in it is not understood."""
        if len(text) > _MAX_CHARACTERS:
            raise InputError(f"--score of {len(text)} characters, expected {_MAX_CHARACTERS}")
        try:
            tree = ast.parse(text.strip(), mode="eval").body
            names = frozenset(_check(tree, text))
        except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            raise InputError(
                f"--score {text!r}: not a formula: expected one such as abs(W)*(a*G+X)"
            ) from error
        for node in ast.walk(tree):
            if _is_constant(node) and not _is_finite(node):
                part = ast.get_source_segment(text.strip(), node)
                raise InputError(f"--score {text!r}: {part} is no finite number in float32")
        if "W" not in names:
            raise InputError(f"--score {text!r}: it does not depend on the weights, W")
        return cls(text, names, tree)

    @property
    def spans_rows(self) -> bool:
        """True if a weight's value depends on other rows: by `ri`, on its column's sum."""
        return "ri" in {node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)}

    def statistics(self, grad_norm: str) -> tuple[str, ...]:
        """What must be read to compute it."""
        table = letters(grad_norm)
        return tuple(dict.fromkeys(table[x] for x in sorted(self.names) if x in table))

    def evaluate(
        self, values: Mapping[str, Callable[[], Tensor]], number: Callable[[float], Tensor]
    ) -> Tensor:
        """The formula over values that are asked for as they are needed; float32, (O, I).

        `number` makes a float32 scalar of a constant. No value is written to.
        """
        result: Tensor = _walk(self.tree, values, number, _FUNCTIONS)
        return result.float()


def _check(node: ast.expr, text: str) -> set[str]:
    """The names in a tree of allowed nodes; InputError for any other."""
    match node:
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _check(left, text) | _check(right, text)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _check(operand, text)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _FUNCTIONS:
            names = _check(argument, text)
            if name == "ri" and names.isdisjoint(matrices := _matrices()):
                raise InputError(f"--score {text!r}: ri() is of a matrix: {', '.join(matrices)}")
            return names
        case ast.Constant(value=int() | float() as number) if not isinstance(
            number, bool
        ) and math.isfinite(float(number)):
            return set()
        case ast.Name(id=name) if name in {*letters(), "W", "G", "a"}:
            return {name}
    part = ast.get_source_segment(text.strip(), node) or text
    known = ", ".join(("W", *letters(), "G", "a", *(f"{x}()" for x in _FUNCTIONS)))
    near = did_you_mean(part.partition("(")[0], (*letters(), *_FUNCTIONS))
    raise InputError(
        f"--score {text!r}: {part[:80]!r} is not understood, expected {known}, numbers, "
        f"parentheses and + - * / ** (a power){near}"
    )


def _matrices() -> tuple[str, ...]:
    """The letters that have a value for each weight."""
    of = letters()
    return ("W", *(x for x in of if STATISTICS[of[x]].axes == (OUT, IN)), "G")


def _is_constant(node: ast.AST) -> TypeGuard[ast.expr]:
    """True for an operand that depends on nothing, of a tree that was checked."""
    names = (x.id for x in ast.walk(node) if isinstance(x, ast.Name))
    return isinstance(node, ast.BinOp | ast.UnaryOp | ast.Call | ast.Constant) and all(
        name in _FUNCTIONS for name in names
    )


def _is_finite(node: ast.expr) -> bool:
    """True if a constant operand is a finite float32."""
    try:
        return math.isfinite(_float32(_walk(node, {}, _float32, _OF_NUMBERS)))
    except (ArithmeticError, ValueError, struct.error):  # 1/0, log(0), a power that is complex
        return False


def _float32(number: float) -> float:
    """The nearest float32; OverflowError beyond the largest."""
    return float(struct.unpack("f", struct.pack("f", number))[0])


def _walk(
    node: ast.expr,
    values: Mapping[str, Callable[[], Any]],
    number: Callable[[float], Any],
    functions: Mapping[str, Callable[[Any], Any]],
) -> Any:
    """The value of a node of a checked tree, in the arithmetic that its leaves are of."""
    match node:
        case ast.BinOp(left=left, op=op, right=right):
            first = _walk(left, values, number, functions)
            return _BINARY[type(op)](first, _walk(right, values, number, functions))
        case ast.UnaryOp(op=op, operand=operand):
            return _UNARY[type(op)](_walk(operand, values, number, functions))
        case ast.Call(func=ast.Name(id=name), args=[argument]):
            return functions[name](_walk(argument, values, number, functions))
        case ast.Constant(value=int() | float() as constant):
            return number(float(constant))
        case ast.Name(id=name):
            return values[name]()
    raise AssertionError(ast.dump(node))  # pragma: no cover (`_check` lets no other through)
