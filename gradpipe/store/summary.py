"""What statistics look like: how norms are spread, how many directions count, what is dead.

Norms are counted by their level, 16 · log₂, as the `compact` encoding keeps them: quantiles are
exact of such a store and within 2.2 % of any other, and those of a block are of all its weights
together, without holding them.

The effective rank of a second moment is (Σλ)² / Σλ² over its eigenvalues, the participation ratio:
N if all directions are alike, 1 if there is but one. It takes the trace and the Frobenius norm, no
decomposition. Shapes: N inputs or outputs; L levels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from gradpipe.errors import StoreError
from gradpipe.store.codec import HIGHEST, LOWEST, STEPS, level_table, triangle_rows, triangle_width
from gradpipe.store.reader import GradientStore
from gradpipe.store.schema import LayerSpec
from gradpipe.store.statistics import STATISTICS, Sums

QUANTILES = (0.01, 0.5, 0.99, 1.0)
OUTLIER_TIMES = 5  # the mean: what OWL (arXiv:2310.05175) calls an outlier
_CHUNK_VALUES = 1 << 20


@dataclass(frozen=True, slots=True)
class Spread:
    """How many norms are of which size, whatever their sign."""

    counts: npt.NDArray[np.int64]  # (L,), from 0 to ∞
    total: float  # of the finite ones

    @classmethod
    def of(cls, norms: Sums) -> Self:
        """Of an array of any shape."""
        counts_L = np.zeros(HIGHEST - LOWEST + 1, dtype=np.int64)
        total, flat = 0.0, norms.reshape(-1)
        for start in range(0, len(flat), _CHUNK_VALUES):
            sizes = np.abs(flat[start : start + _CHUNK_VALUES])
            with np.errstate(divide="ignore"):  # log 0 is −∞, and held to the lowest
                levels = np.rint(STEPS * np.log2(sizes)).clip(LOWEST, HIGHEST)
            counts_L += np.bincount(levels.astype(np.int64) - LOWEST, minlength=len(counts_L))
            total += float(sizes.sum(where=np.isfinite(sizes), dtype=np.float64))
        return cls(counts_L, total)

    @classmethod
    def sum(cls, parts: Iterable[Spread]) -> Self:
        """Of all the parts."""
        spreads = list(parts)
        counts_L = np.sum([x.counts for x in spreads], axis=0)
        return cls(counts_L, sum(x.total for x in spreads))

    @property
    def quantiles(self) -> tuple[float, ...]:
        """Norms that these shares of all do not exceed: `QUANTILES`."""
        upto_L = np.cumsum(self.counts)
        ranks = [max(1, math.ceil(share * int(upto_L[-1]))) for share in QUANTILES]
        return tuple(float(x) for x in level_table()[np.searchsorted(upto_L, ranks)])

    @property
    def outliers(self) -> float:
        """The share of norms above `OUTLIER_TIMES` their mean."""
        mean = self.total / max(int(self.counts[:-1].sum()), 1)
        above_L = level_table() > OUTLIER_TIMES * mean
        return float(self.counts[above_L].sum() / self.counts.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A layer, or a block: its layers taken together."""

    name: str
    num_layers: int
    num_weights: int
    num_tokens: int  # that reached it; of a block, the most that reached a layer
    unseen: int | None  # layers that none reached: experts; None if tokens were not counted
    dead_inputs: int | None  # that were always 0; None if nothing stored tells
    spreads: dict[str, Spread]  # by statistic
    ranks: dict[str, float]  # effective, by second moment; of a layer alone

    def to_json(self) -> dict[str, Any]:
        """As plain values; null for what is not finite."""
        norms = {
            name: {
                "quantiles": [x if math.isfinite(x) else None for x in spread.quantiles],
                "outliers": spread.outliers,
            }
            for name, spread in self.spreads.items()
        }
        return {
            "name": self.name,
            "layers": self.num_layers,
            "weights": self.num_weights,
            "tokens": self.num_tokens,
            "unseen": self.unseen,
            "dead_inputs": self.dead_inputs,
            "norms": norms,
            "effective_ranks": self.ranks,
        }


def summary_of(store: GradientStore, layer: LayerSpec) -> Summary:
    """One layer; StoreError if a statistic is damaged."""
    counted = bool(store.spec.samples.digest)
    spreads, ranks, dead = {}, {}, None
    for name in layer.own(store.spec.statistics):
        norms = store.read_norms(layer, name)
        if np.isnan(norms).any():  # a hostile store's squares may be negative
            raise StoreError(
                f"store {store.url}: {name} of {layer.name} holds what is no number: the store is "
                "damaged"
            )
        if STATISTICS[name].is_symmetric:
            ranks[name] = effective_rank(norms)
        else:
            spreads[name] = Spread.of(norms)
        if name in {"act_l2", "hessian"}:
            of_inputs = norms if name == "act_l2" else norms[diagonal(len(norms))]
            dead = int((of_inputs == 0).sum())
    num_tokens = store.counts(layer, store.spec.statistics[-1]).num_tokens
    return Summary(
        name=layer.name,
        num_layers=1,
        num_weights=layer.num_weights,
        num_tokens=num_tokens,
        unseen=int(num_tokens == 0) if counted else None,
        dead_inputs=dead,
        spreads=spreads,
        ranks=ranks,
    )


def block_of(name: str, layers: Iterable[tuple[LayerSpec, Summary]]) -> Summary:
    """A block of these layers; inputs that several of them read are counted once."""
    specs, parts = zip(*layers, strict=True)
    firsts = [x for spec, x in zip(specs, parts, strict=True) if spec.input_of is None]
    dead = [x.dead_inputs for x in firsts if x.dead_inputs is not None]
    unseen = [x.unseen for x in parts if x.unseen is not None]
    names = dict.fromkeys(name for x in parts for name in x.spreads)
    return Summary(
        name=name,
        num_layers=len(parts),
        num_weights=sum(x.num_weights for x in parts),
        num_tokens=max(x.num_tokens for x in parts),
        unseen=sum(unseen) if unseen else None,
        dead_inputs=sum(dead) if dead else None,
        spreads={
            name: Spread.sum(x.spreads[name] for x in parts if name in x.spreads) for name in names
        },
        ranks={},
    )


def diagonal(length: int) -> npt.NDArray[np.int64]:
    """Where the diagonal lies in a packed upper triangle of so many entries."""
    return np.array([row.start for row in triangle_rows(triangle_width(length))])


def effective_rank(packed: Sums) -> float:
    """(Σλ)² / Σλ² of the matrix of a packed upper triangle; 0 of one that is all 0."""
    on_diagonal = diagonal(len(packed))
    trace = float(packed[on_diagonal].sum(dtype=np.float64))
    if trace <= 0:
        return 0.0
    fits = trace <= float(np.finfo(np.float32).max)  # its summands do, their sum need not
    shares = packed / (np.float32(trace) if fits else np.float64(trace))
    own = shares[on_diagonal]
    return 1 / (2 * float(np.dot(shares, shares)) - float(np.dot(own, own)))
