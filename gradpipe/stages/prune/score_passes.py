"""What allocation rules ask of scores: passes over all layers, a few numbers for each as answer.

Scores of a model do not fit in memory: each pass computes them layer by layer again.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gradpipe.stages.prune.thresholds import Thresholds
from gradpipe.store.schema import LayerSpec

ComputeScore = Callable[[str], Tensor]  # of the layer of a name, float32 (O, I)


@dataclass(frozen=True, slots=True)
class ScorePasses:
    """The scores of all layers, looked at in passes: what rules ask."""

    layers: Mapping[str, LayerSpec]  # by name
    compute: ComputeScore

    def outlier_shares(self, blocks: Mapping[str, str], times: float) -> dict[str, float]:
        """Each block's share of scores above so many `times` its mean; two passes.

        `blocks` tells each layer's.
        """
        totals: dict[str, float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)
        outliers: dict[str, int] = defaultdict(int)
        for name, score_OI in self._scores(blocks):
            totals[blocks[name]] += float(score_OI.sum(dtype=torch.float64))
            counts[blocks[name]] += score_OI.numel()
        for name, score_OI in self._scores(blocks):
            block = blocks[name]
            outliers[block] += int((score_OI > times * totals[block] / counts[block]).sum())
        return {block: outliers[block] / count for block, count in counts.items()}

    def medians(self, blocks: Mapping[str, str]) -> dict[str, float]:
        """Each block's median score, the lower one of two; two passes."""
        inside: dict[str, list[str]] = defaultdict(list)
        for name, block in blocks.items():
            inside[block].append(name)
        medians = {}
        for block, names in inside.items():
            middle = (sum(self.layers[name].num_weights for name in names) - 1) // 2
            [medians[block]] = Thresholds(partial(self._scores, names), [middle]).values
        return medians

    def counts_of_lowest(self, counts: Sequence[int]) -> list[dict[str, int]]:
        """For each count, how many weights of each layer are among so many lowest of all.

        Three passes.
        """
        ranks = [max(count - 1, 0) for count in counts]
        thresholds = Thresholds(partial(self._scores, self.layers), ranks)
        none = dict.fromkeys(self.layers, 0)
        found = thresholds.upto()
        return [upto if count else none for count, upto in zip(counts, found, strict=True)]

    def _scores(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.compute(name)) for name in names)
