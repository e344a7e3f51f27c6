"""What a report is of: outputs, sweeps, stores, and what was measured of weights and statistics."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gradpipe.pipeline.reports.recorded import Recorded
from gradpipe.pipeline.reports.series import Sweep
from gradpipe.store.reader import GradientStore

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskFact:
    """Where weights are kept, in cells of a picture: 1 all of them, 0 none."""

    title: str
    kept: Matrix  # (outputs, inputs), of cells


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreFact:
    """How many weights of which score were kept and pruned."""

    title: str
    edges: Matrix  # of bins of log₁₀ of the score, one more than there are bins
    kept: npt.NDArray[np.int64]
    pruned: npt.NDArray[np.int64]
    num_zero: int  # weights whose score is 0, and which no bin holds
    cuts: tuple[float, float, float] | None  # log₁₀, the 5th, 50th, 95th percentile over groups


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """What is shown of one layer."""

    name: str
    shape: tuple[int, ...]
    masks: tuple[MaskFact, ...] = ()
    scores: tuple[ScoreFact, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that was measured; what could not be is in `missing`, with how to have it."""

    layers: tuple[LayerFacts, ...] = ()
    outliers: Mapping[str, float] = field(default_factory=dict)  # layer or block -> share
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # output -> layer
    ranks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # statistic -> layer
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a report is of, by the names that the user gave."""

    outputs: Mapping[str, Recorded]
    sweeps: tuple[Sweep, ...]
    stores: Mapping[str, GradientStore]
    facts: Facts
