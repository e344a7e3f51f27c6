"""Which layers' outputs are other layers' inputs, one to one: what structured pruning cuts at once.

Gate and up feed down so, and v feeds o head by head. No table of names knows it: the model runs
without its weights (`stand_in.py`), the outputs of a layer are shifted by a little, and the inputs
of the others tell by how much they moved. One row of a batch shifts all outputs, one those whose
index has bit k, for each k, and one each output by a random amount. An input that follows a single
output i moves with the k-th row where i has bit k, and not at all elsewhere; one that follows two
(a fused gate and up) moves by two amounts and their sum, which tells the two indices apart. What
was read so must then foretell all rows, the random one too: an input that mixes outputs, as after
a norm, fails that, and is no coupling.

Shapes: N rows; O outputs of all sources that are shifted at once, I inputs of a target.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradpipe.stages.model.layers import Blocks, Layer
from gradpipe.stages.model.stand_in import Call, StandIn
from gradpipe.store.schema import CouplingSpec

_STEP = 1e-7  # of the made-up outputs, which are near 1

_TOLERANCE = 1e-5  # of the largest move of an input; a step's curvature and rounding are far below

_SEEDS = (0, 1)  # an input may follow two outputs by amounts too near to tell apart: once in 10⁵

_STILL = 1e-4  # an input that moves by less than this part of a step does not move

_Runs = tuple[tuple[int, int], ...]

_Couplings = dict[tuple[str, str], list[_Runs]]  # (source, target), less the block's path -> runs


def find_couplings(
    model: Any, blocks: Blocks, layers: Sequence[Layer]
) -> tuple[CouplingSpec, ...]:
    """The couplings inside each block, in the layers' order of targets, sources, outputs.

    None where the model's code does not run so. Blocks that look alike are traced twice, the first
    and the last of them, and what both show holds for all.
    """
    inside = {layer.path: layer for layer in layers if layer.spec.block is not None}
    groups = {path: _groups(path, inside) for path in blocks.paths}
    widths = [sum(x.spec.shape[0] for x in g) for block in groups.values() for g in block]
    stand_in = StandIn(model, num_rows=3 + max(widths, default=1).bit_length())
    calls = stand_in.calls(blocks.paths)
    alike = defaultdict(list)
    for path, call in calls.items():
        alike[_looks(stand_in, path, call)].append(path)
    found = {}
    for paths in alike.values():
        traced = [_trace(stand_in, p, calls[p], groups[p]) for p in {paths[0], paths[-1]}]
        agreed = {key: runs for key, runs in traced[0].items() if traced[-1].get(key) == runs}
        found |= {(p + s, p + t): runs for p in paths for (s, t), runs in agreed.items()}
    return tuple(_specs(found, inside))


def _specs(found: _Couplings, layers: Mapping[str, Layer]) -> Iterator[CouplingSpec]:
    order = {path: index for index, path in enumerate(layers)}
    for source, target in sorted(found, key=lambda pair: (order[pair[1]], order[pair[0]])):
        for outputs in found[source, target]:
            yield CouplingSpec(
                source=layers[source].spec.name, target=layers[target].spec.name, outputs=outputs
            )


def _groups(block: str, layers: Mapping[str, Layer]) -> list[list[Layer]]:
    """The block's layers, those together that differ in numbers alone, as experts do.

    It spares runs; any grouping finds the same.
    """
    groups = defaultdict(list)
    for path, layer in layers.items():
        if path.startswith(block + "."):
            groups[re.sub(r"\.\d+\.", ".#.", path.removeprefix(block))].append(layer)
    return list(groups.values())


def _looks(stand_in: StandIn, path: str, call: Call) -> object:
    """Equal for blocks of the same modules and shapes that run alike: who reads whose input."""
    block = stand_in.model.get_submodule(path)
    inputs = stand_in.run(path, call)
    firsts: dict[int, str] = {}
    reads = [
        (name.removeprefix(path), firsts.setdefault(id(x), name.removeprefix(path)))
        for name, x in inputs.items()
    ]
    shapes = [(name, p.shape) for name, p in block.named_parameters()]
    kinds = [(name, type(module)) for name, module in block.named_modules()]
    return tuple(reads), tuple(shapes), tuple(kinds)


def _trace(
    stand_in: StandIn, path: str, call: Call, groups: Iterable[Sequence[Layer]]
) -> _Couplings:
    """The couplings inside one block, each layer's path less the block's."""
    found: _Couplings = {}
    for group in groups:
        stops = list(itertools.accumulate(layer.spec.shape[0] for layer in group))
        for target, read_2I in _trace_group(stand_in, path, call, group).items():
            for indices_I in _sequences(read_2I):
                number = bisect.bisect(stops, int(indices_I[0]))
                local_I = indices_I - ([0, *stops][number])
                if 0 <= local_I.min() and local_I.max() < group[number].spec.shape[0]:
                    key = group[number].path.removeprefix(path), target.removeprefix(path)
                    found.setdefault(key, []).append(_runs(local_I.tolist()))
    return found


def _trace_group(
    stand_in: StandIn, path: str, call: Call, group: Sequence[Layer]
) -> dict[str, Tensor]:
    """Shift the outputs of all the group's layers, end to end: as `_read`, for each target."""
    widths = [layer.spec.shape[0] for layer in group]
    shifts_NO = _shifts(stand_in.num_rows, sum(widths))
    paths = [layer.path for layer in group]
    stand_in.shifts = dict(zip(paths, (_STEP * shifts_NO).split(widths, dim=1), strict=True))
    reads: dict[str, Tensor] = {}
    for stand_in.seed in _SEEDS:
        inputs = stand_in.run(path, call)
        known = {id(x): _read(x, shifts_NO) for x in inputs.values()}
        for target, x in inputs.items():
            old_2I = reads.get(target, known[id(x)])
            reads[target] = torch.where(old_2I < 0, known[id(x)], old_2I)
        if all(bool((read < 0).all() or (read >= 0).all()) for read in reads.values()):
            break
    stand_in.seed, stand_in.shifts = 0, {}
    return reads


def _shifts(num_rows: int, width: int) -> Tensor:
    """By how much each row shifts each output: nothing, 1, each bit of its index, random; (N, O)."""
    index_O = torch.arange(width)
    bits = [(index_O >> k) & 1 for k in range(num_rows - 3)]
    random_O = torch.rand(width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.stack([torch.zeros(width), torch.ones(width), *bits, random_O]).double()


def _read(x: Tensor, shifts_NO: Tensor) -> Tensor:
    """The two outputs that each input follows, the lower first, or twice the only one, (2, I).

    -1 where an input follows none, or more.
    """
    x_NTI = x.reshape(len(shifts_NO), x.shape[:-1].numel() // len(shifts_NO), x.shape[-1])
    if x_NTI.shape[1] == 0:
        return torch.full((2, x.shape[-1]), -1)
    moves_NI = (x_NTI[:, -1] - x_NTI[0, -1]) / _STEP
    total_I, bits_KI = moves_NI[1], moves_NI[2:-1]
    largest_I = moves_NI.abs().amax(dim=0)
    split_I, bit_I = torch.minimum(bits_KI.abs(), (total_I - bits_KI).abs()).max(dim=0)
    is_pair_I = split_I > _TOLERANCE * largest_I
    one_I = torch.where(is_pair_I, bits_KI.gather(0, bit_I[None])[0], total_I)
    amounts_2I = torch.stack([one_I, total_I - one_I])
    first_I, second_I = _index(bits_KI, *amounts_2I), _index(bits_KI, *amounts_2I.flip(0))
    read_2I = torch.stack([first_I, torch.where(is_pair_I, second_I, first_I)])
    told_NI = sum(
        amount_I * shifts_NO[:, index_I.clamp(max=shifts_NO.shape[1] - 1)]
        for amount_I, index_I in zip(amounts_2I, read_2I, strict=True)
    )
    is_told_I = ((moves_NI - told_NI).abs() <= _TOLERANCE * largest_I).all(dim=0)
    is_read_I = is_told_I & (largest_I > _STILL) & (read_2I < shifts_NO.shape[1]).all(dim=0)
    return torch.where(is_read_I, read_2I.sort(dim=0).values, -1)


def _index(bits_KI: Tensor, amount_I: Tensor, other_I: Tensor) -> Tensor:
    """The index whose bits are set where a row moved by `amount`, with the other's or without."""
    with_it = torch.minimum((bits_KI - amount_I).abs(), (bits_KI - amount_I - other_I).abs())
    without = torch.minimum(bits_KI.abs(), (bits_KI - other_I).abs())
    weights_K1 = 2 ** torch.arange(len(bits_KI))[:, None]
    return ((with_it < without) * weights_K1).sum(dim=0)


def _sequences(read_2I: Tensor) -> list[Tensor]:
    """The outputs in order of the inputs: one sequence of them, two, or none if any is unknown."""
    is_single_I = read_2I[0] == read_2I[1]
    if bool((read_2I < 0).any()) or bool(is_single_I.any() != is_single_I.all()):
        return []
    return [read_2I[0]] if bool(is_single_I.all()) else list(read_2I)


def _runs(indices: Sequence[int]) -> _Runs:
    """(start, length) of consecutive indices; a run ends where another begins, or ends.

    So heads that share a value are a run each.
    """
    starts = [0] + [i for i in range(1, len(indices)) if indices[i] != indices[i - 1] + 1]
    ends = [*starts[1:], len(indices)]
    cuts = {indices[i] for i in starts} | {indices[i - 1] + 1 for i in ends}
    begins = [i for i in range(len(indices)) if i in set(starts) or indices[i] in cuts]
    return tuple((indices[i], j - i) for i, j in itertools.pairwise([*begins, len(indices)]))
