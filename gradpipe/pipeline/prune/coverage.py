"""What of a checkpoint no layer covers: it stays dense, and counts in the share of zeros."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Self

from gradpipe.pipeline.prune.plan import PrunePlan
from gradpipe.pipeline.reports.results import LayerResult, Zeros
from gradpipe.stages.checkpoint.layer_names import list_of
from gradpipe.stages.checkpoint.tensors import FLOAT_TYPES, TensorInfo, as_tensor, count_zeros


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncovered:
    """The float weights of a checkpoint that are in no pruned layer."""

    in_blocks: Zeros
    outside: Zeros
    matrices: Mapping[str, int]  # of the blocks: tensor -> its weights that stay dense
    unmeasured: tuple[str, ...]  # of those, the tensors that are no layers of the store
    other_lists: Mapping[str, int]  # lists that the store has nothing of, as a tower's: weights

    @classmethod
    def of(cls, plan: PrunePlan) -> Self:
        """Read what a pruning leaves as it is; the same for all its targets."""
        lists = {list_of(x.weight_key) for x in plan.layers.values() if x.block is not None}
        covered: Counter[str] = Counter()
        for layer in plan.layers.values():
            covered[layer.weight_key] += layer.num_weights
        found: dict[bool, list[Zeros]] = {True: [], False: []}
        matrices = {}
        for info in plan.checkpoint.tensors.values():
            size = prod(info.shape) - covered[info.key]
            if info.dtype in FLOAT_TYPES and size:
                in_blocks = list_of(info.key) in lists
                found[in_blocks].append(Zeros(zeros=_zeros(plan, info), size=size))
                if in_blocks and len(info.shape) > 1:
                    matrices[info.key] = size
        measured = {layer.weight_key for layer in plan.store.spec.layers}
        other_lists: Counter[str] = Counter()
        for info in plan.checkpoint.tensors.values():
            name = list_of(info.key)
            if name and len(info.shape) > 1 and info.dtype in FLOAT_TYPES:
                other_lists[name] += prod(info.shape)
        for key in measured:
            other_lists.pop(list_of(key) or "", None)
        return cls(
            in_blocks=Zeros.sum(found[True]),
            outside=Zeros.sum(found[False]),
            matrices=matrices,
            unmeasured=tuple(key for key in matrices if key not in measured),
            other_lists=other_lists,
        )

    def shares(self, plan: PrunePlan, layers: Iterable[LayerResult]) -> tuple[Zeros, Zeros]:
        """Zeros of all weights of the blocks, and of the files, with those of pruned layers."""
        own: dict[bool, list[LayerResult]] = {True: [], False: []}
        for x in layers:
            own[plan.layers[x.name].block is not None].append(x)
        blocks = Zeros.sum([*own[True], self.in_blocks])
        return blocks, Zeros.sum([*own[False], self.outside, blocks])

    def lines(self) -> list[str]:
        """A line if matrices of the blocks are no layers of the store, and one for each tower."""
        lines = [
            f"stays dense: {name}, {size:,} weights: the store has no layers of it"
            for name, size in self.other_lists.items()
        ]
        if not self.unmeasured:
            return lines
        more = len(self.unmeasured) - 1
        size = sum(self.matrices[key] for key in self.unmeasured)
        name = self.unmeasured[0] + (f" and {more} more" if more else "")
        own = f"stays dense: {name}, {size:,} weights of the blocks: no layers of the store"
        return [own, *lines]


def _zeros(plan: PrunePlan, info: TensorInfo) -> int:
    """Of a tensor without its parts that are pruned."""
    places = [plan.places[x.name] for x in plan.layers.values() if x.weight_key == info.key]
    counts = [count_zeros(as_tensor(plan.checkpoint.read_place(x), x)) for x in (info, *places)]
    return counts[0] - sum(counts[1:])
