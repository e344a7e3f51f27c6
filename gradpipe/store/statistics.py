"""The statistics that a store can hold: all that one is stands in its entry of `STATISTICS`.

A statistic is an array per layer that calibration samples are added to one by one, and that parts
of the samples can be merged from. Stage one asks the entry what to watch and how to add, the codec
how to store, formulas under which letter and in which unit. To add one, write the function that
adds a sample and an entry; the order of the table is the order in a store:

    def add_largest(sums_O, y_TO):
        sums_O.copy_(sums_O.maximum(y_TO.float().abs().amax(dim=0)))

    largest = Statistic(name="out_max", of=OUTPUTS, axes=(OUT,), add=add_largest, merge=np.maximum)
    STATISTICS[largest.name] = largest

Tensors are torch's, of which only methods are used: the store is read without torch.
Shapes: T tokens of one sample (for an expert, those routed to it), I in, O out; N either.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:  # the command's options are known without numpy
    import numpy as np
    import numpy.typing as npt

Sums: TypeAlias = "npt.NDArray[np.float32]"
INPUTS, OUTPUTS = "inputs", "outputs"  # x (T, I), y (T, O) of a sample, in float32
OUTPUT_GRADIENTS = "output gradients"  # dy (T, O) of the sample's loss, in float32
WEIGHT_GRADIENTS = "weight gradients"  # G = dyᵀx (O, I), some rows at a time
OUT, IN = "out", "in"
ENCODINGS = ("compact", "float32", "float16")
_PANEL_ROWS = 128  # of a second moment, summed by one product at least
_REFERENCE_SAMPLES = 128  # gradients in formulas are those of so many, as in GBLM-Pruner's code


def _as_it_is(norms: Any, _: int) -> Any:
    return norms


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistic:
    """All that a statistic is.

    Sums start at 0 and are float32. `add(sums, values)` adds one sample's values, which `of` names,
    in place; rows of G go with the same rows of the sums, where these have any.
    """

    name: str
    of: str  # INPUTS, OUTPUTS, OUTPUT_GRADIENTS or WEIGHT_GRADIENTS
    axes: tuple[str, ...]  # of OUT and IN; twice the same: a symmetric matrix, kept as a triangle
    add: Callable[[Any, Any], object]
    merge: Callable[[Sums, Sums], Sums] = operator.add  # of some samples and of others
    uses_up: bool = False  # of weight gradients alone: `add` overwrites them, and is called last
    is_squared: bool = False  # sums of squares, whose roots are the norms
    compact: str = "float32"  # its encoding in a compact store: see `gradpipe.store.codec`
    compact_bytes: float = 4.0  # a value's, in that encoding
    base: str | None = None  # the statistic whose levels are added, in encoding log
    once_per_input: bool = False  # layers that read the same input keep one
    letter: str | None = None  # in formulas
    unit: Callable[[Any, int], Any] = _as_it_is  # norms over so many samples -> the letter's values
    grad_norm: str | None = None  # how it is named where the letter G may stand for it
    gblm_file: str | None = None  # which file of GBLM-Pruner's code holds it: l1 or l2
    is_default: bool = False  # collected unless the user says otherwise

    @property
    def needs_backward(self) -> bool:
        """True if it is of gradients."""
        return self.of in {OUTPUT_GRADIENTS, WEIGHT_GRADIENTS}

    @property
    def is_symmetric(self) -> bool:
        """True for second moments, (N, N), which are stored as packed upper triangles."""
        return len(self.axes) == 2 and self.axes[0] == self.axes[1]

    @property
    def has_rows(self) -> bool:
        """True if its values belong to outputs, row by row of the weights."""
        return self.axes[0] == OUT and not self.is_symmetric

    def sum_shape(self, layer: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that it is summed in, for a layer of shape (out, in)."""
        return tuple(layer[0] if axis == OUT else layer[1] for axis in self.axes)

    def stored_shape(self, layer: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that it is stored in: the same, or N (N + 1) / 2 of a triangle, row by row."""
        shape = self.sum_shape(layer)
        return (shape[0] * (shape[0] + 1) // 2,) if self.is_symmetric else shape

    def encoding(self, of_store: str) -> str:
        """What a store's encoding means for it."""
        if of_store == "compact" or (self.is_symmetric and of_store != "float32"):
            return self.compact
        return of_store

    @property
    def encodings(self) -> tuple[str, ...]:
        """Those that it may be in."""
        return tuple(dict.fromkeys(map(self.encoding, ("float32", "float16", "compact"))))

    def stored_bytes(self, of_store: str, layer: tuple[int, ...]) -> float:
        """About how many bytes it takes in a store, less metadata."""
        sizes = {"float32": 4.0, "float16": 2.0}
        size = sizes.get(self.encoding(of_store), self.compact_bytes)
        return math.prod(self.stored_shape(layer)) * size

    def norm_of(self, sums: Sums) -> Sums:
        """The root of sums of squares, other sums as they are."""
        import numpy as np  # noqa: PLC0415 (see above)

        with np.errstate(invalid="ignore"):  # a hostile store's squares may be negative: NaN
            return np.sqrt(sums) if self.is_squared else sums


def _add_squares(sums: Any, values: Any) -> None:
    sums.addcmul_(values, values)


def _add_sizes(sums: Any, values: Any) -> None:
    sums += values.abs_()


def _add_tokens(sums_I: Any, x_TI: Any) -> None:
    sums_I += x_TI.sum(dim=0)


def _add_squared_tokens(sums_I: Any, x_TI: Any) -> None:
    sums_I += x_TI.square().sum(dim=0)


def _add_moment(sums_NN: Any, values_TN: Any) -> None:
    """Σ v vᵀ over tokens, its rows in up to 16 panels, each from its diagonal on.

    Only the upper triangle is kept. Narrower panels save no more time.
    """
    start = 0
    for panel in sums_NN.tensor_split(min(16, max(1, len(sums_NN) // _PANEL_ROWS))):
        stop = start + len(panel)
        panel[:, start:].addmm_(values_TN[:, start:stop].T, values_TN[:, start:])
        start = stop


def _mean(norms: Any, num_samples: int) -> Any:
    return norms * (_REFERENCE_SAMPLES / num_samples)


def _root_mean(norms: Any, num_samples: int) -> Any:
    return norms * math.sqrt(_REFERENCE_SAMPLES / num_samples)


def _root_mean_input(norms: Any, num_samples: int) -> Any:
    return norms / math.sqrt(num_samples)


STATISTICS: dict[str, Statistic] = {
    statistic.name: statistic
    for statistic in (
        Statistic(  # Σₙ|Gₙ|
            name="grad_l1",
            of=WEIGHT_GRADIENTS,
            axes=(OUT, IN),
            add=_add_sizes,
            uses_up=True,
            compact="log",
            compact_bytes=0.33,  # measured, at 128 samples: docs/benchmarks.md
            base="grad_l2",
            letter="G1",
            grad_norm="l1",
            unit=_mean,
            gblm_file="l1",
            is_default=True,
        ),
        Statistic(  # Σₙ Gₙ²
            name="grad_l2",
            of=WEIGHT_GRADIENTS,
            axes=(OUT, IN),
            add=_add_squares,
            is_squared=True,
            compact="log",
            compact_bytes=0.48,
            letter="G2",
            grad_norm="l2",
            unit=_root_mean,
            gblm_file="l2",
            is_default=True,
        ),
        Statistic(  # Σₙ Gₙ
            name="grad_sum",
            of=WEIGHT_GRADIENTS,
            axes=(OUT, IN),
            add=operator.iadd,
            compact="float16",
            compact_bytes=2.0,
            letter="GS",
            grad_norm="sum",
            unit=_mean,
        ),
        Statistic(  # Σₙ Σₜ xₙₜ²
            name="act_l2",
            of=INPUTS,
            axes=(IN,),
            add=_add_squared_tokens,
            is_squared=True,
            letter="X",
            unit=_root_mean_input,
            is_default=True,
        ),
        Statistic(  # Σₙ Σₜ xₙₜ
            name="act_sum",
            of=INPUTS,
            axes=(IN,),
            add=_add_tokens,
        ),
        Statistic(  # Σₙ Σₜ xₙₜ xₙₜᵀ
            name="hessian",
            of=INPUTS,
            axes=(IN, IN),
            add=_add_moment,
            compact="correlation",
            compact_bytes=2.0,
            once_per_input=True,
        ),
        Statistic(  # Σₙ Σₜ dyₙₜ dyₙₜᵀ
            name="grad_cov",
            of=OUTPUT_GRADIENTS,
            axes=(OUT, OUT),
            add=_add_moment,
            compact="correlation",
            compact_bytes=2.0,
        ),
    )
}

DEFAULT_STATISTICS = tuple(name for name, x in STATISTICS.items() if x.is_default)
SECOND_MOMENTS = tuple(name for name, x in STATISTICS.items() if x.is_symmetric)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """The statistics of these names, each once, in the table's order."""
    wanted = set(names)
    return tuple(name for name in STATISTICS if name in wanted)


def letters(grad_norm: str | None = None) -> dict[str, str]:
    """The statistic that each letter of a formula stands for; G too, by the name of a norm."""
    of = {x.letter: name for name, x in STATISTICS.items() if x.letter}
    named = {x.grad_norm: name for name, x in STATISTICS.items()}
    return of if grad_norm is None else of | {"G": named[grad_norm]}


def is_of_activations(name: str) -> bool:
    """True for sums over inputs that cost next to nothing, and that an import takes along."""
    statistic = STATISTICS[name]
    return statistic.of == INPUTS and not statistic.is_symmetric


def needs_backward(names: Iterable[str]) -> bool:
    """True if any of them is of gradients."""
    return any(STATISTICS[name].needs_backward for name in names)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStats:
    """One layer's sums over samples, packed as they are stored."""

    arrays: Mapping[str, Sums]  # by statistic
    num_samples: int
    num_tokens: int

    def merged(self, more: LayerStats) -> LayerStats:
        """The same over these samples and others."""
        return LayerStats(
            arrays={x: STATISTICS[x].merge(s, more.arrays[x]) for x, s in self.arrays.items()},
            num_samples=self.num_samples + more.num_samples,
            num_tokens=self.num_tokens + more.num_tokens,
        )
