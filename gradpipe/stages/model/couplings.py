"""Which layers' outputs are other layers' inputs, one to one: what structured pruning cuts at once.

Gate and up feed down so, and v feeds o head by head. No table of names knows it: the model runs
without its weights (`stand_in.py`), the outputs of a layer are shifted by a little, and the inputs
of the others tell by how much they moved. One row of a batch shifts all outputs, one those whose
index has bit k, for each k, and one each output by a random amount. An input that follows a single
output i moves with the k-th row where i has bit k, and not at all elsewhere; one that follows two
(a fused gate and up) moves by two amounts and their sum, which tells the two indices apart. What
was read so must then predict all rows, the random one too: an input that mixes outputs, as after
a norm, fails that, and is no coupling.

Shapes: N rows; O outputs of all sources that are shifted at once, I inputs of a target.
"""

import bisect
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradpipe.stages.model.blocks import Blocks
from gradpipe.stages.model.layers import Layer
from gradpipe.stages.model.stand_in import Call, StandIn
from gradpipe.store.schema import CouplingSpec

_STEP = 1e-7  # of the made-up outputs, which are near 1
_TOLERANCE = 1e-5  # of the largest move of an input; a step's curvature and rounding are far below
_SEEDS = (0, 1)  # an input may follow two outputs by amounts too near to tell apart: once in 10⁵
_STILL = 1e-4  # an input that moves by less than this part of a step does not move
_Runs = tuple[tuple[int, int], ...]
_Couplings = dict[tuple[str, str], list[_Runs]]  # (target, source), both less the block's path


def find_couplings(model: Any, blocks: Blocks, layers: Sequence[Layer]) -> tuple[CouplingSpec, ...]:
    """The couplings inside each block, in the layers' order of targets, sources, outputs.

    None where the model's code does not run so. Of blocks that look alike the first and the last
    are traced, and what both show holds for all. `layers` know whose input they read.
    """
    inside: dict[str, list[Layer]] = {path: [] for path in blocks.paths}
    for layer in layers:
        if layer.spec.block is not None:
            inside[blocks.paths[layer.spec.block]].append(layer)
    kinds = _kinds(model, inside)
    like = {path: kind[0] for kind in kinds for path in kind}
    like |= {kind[-1]: kind[-1] for kind in kinds}
    groups = {path: _groups(path, inside[path]) for path in sorted(set(like.values()))}
    widths = [sum(x.spec.shape[0] for x in group) for block in groups.values() for group in block]
    stand_in = StandIn(model, num_rows=3 + max(widths, default=0).bit_length(), like=like)
    calls = stand_in.calls(groups)
    traced = {path: _trace(stand_in, path, call, groups[path]) for path, call in calls.items()}
    names = {layer.path: layer.spec.name for layer in layers}
    found = [
        (path + target, path + source, outputs)
        for kind in kinds
        for (target, source), sequences in traced.get(kind[0], {}).items()
        if traced.get(kind[-1], {}).get((target, source)) == sequences
        for path in kind
        for outputs in sequences
        if path + target in names  # or it stays dense
    ]
    order = {path: index for index, path in enumerate(names)}
    return tuple(
        CouplingSpec(source=names[source], target=names[target], outputs=outputs)
        for target, source, outputs in sorted(found, key=lambda x: (order[x[0]], order[x[1]], x[2]))
    )


def _kinds(model: Any, inside: Mapping[str, Sequence[Layer]]) -> list[list[str]]:
    """The blocks' paths, those together that have the same modules, shapes and shared inputs."""
    kinds = defaultdict(list)
    for path, layers in inside.items():
        block = model.get_submodule(path)
        order = {layer.spec.name: index for index, layer in enumerate(layers)}
        reads = [order.get(layer.spec.input_of or "") for layer in layers]
        shapes = [(name, parameter.shape) for name, parameter in block.named_parameters()]
        types = [(name, type(module)) for name, module in block.named_modules()]
        kinds[tuple(reads), tuple(shapes), tuple(types)].append(path)
    return list(kinds.values())


def _groups(block: str, layers: Iterable[Layer]) -> list[list[Layer]]:
    """The block's layers, those together that differ in numbers alone, as experts do.

    It spares runs; any grouping finds the same.
    """
    groups = defaultdict(list)
    for layer in layers:
        groups[re.sub(r"\.\d+\.", ".#.", layer.path.removeprefix(block))].append(layer)
    return list(groups.values())


def _trace(
    stand_in: StandIn, path: str, call: Call, groups: Iterable[Sequence[Layer]]
) -> _Couplings:
    found: _Couplings = {}
    for group in groups:
        stops = list(itertools.accumulate(layer.spec.shape[0] for layer in group))
        for target, read_2I in _trace_group(stand_in, path, call, group).items():
            for indices_I in _sequences(read_2I):
                number = bisect.bisect(stops, int(indices_I[0]))
                local_I = indices_I - ([0, *stops][number])
                if local_I.min() >= 0 and local_I.max() < group[number].spec.shape[0]:
                    key = target.removeprefix(path), group[number].path.removeprefix(path)
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
    """How much rows shift outputs: by 0, by 1, by each bit of the index, at random; (N, O)."""
    index_O = torch.arange(width)
    bits = [(index_O >> k) & 1 for k in range(num_rows - 3)]
    random_O = torch.rand(width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.stack([torch.zeros(width), torch.ones(width), *bits, random_O]).double()


def _read(x: Tensor, shifts_NO: Tensor) -> Tensor:
    """The two outputs that each input follows, the lower first, or twice the only one, (2, I).

    -1 where an input follows none, or more.
    """
    num_tokens, rest = divmod(x.shape[:-1].numel(), len(shifts_NO))
    if num_tokens == 0 or rest:
        return torch.full((2, x.shape[-1]), -1)
    x_NTI = x.reshape(len(shifts_NO), num_tokens, x.shape[-1])
    moves_NI = (x_NTI[:, -1] - x_NTI[0, -1]) / _STEP
    largest_I = moves_NI.abs().amax(dim=0)
    if not bool((largest_I > _STILL).any()):  # so it is for most pairs of a source and a target
        return torch.full((2, x.shape[-1]), -1)
    total_I, bits_KI = moves_NI[1], moves_NI[2:-1]
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
