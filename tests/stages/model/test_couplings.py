"""Couplings: which layers' outputs are which layers' inputs, one to one.

Found without weights; here held against truths written by hand, and against real models in which
each row of each weight is changed to see which inputs move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradpipe import collect
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.model import skeleton as skeletons
from gradpipe.stages.model.blocks import Blocks
from gradpipe.stages.model.conversion import find_sources
from gradpipe.stages.model.couplings import find_couplings
from gradpipe.stages.model.experts import RoutedLinear, split_experts
from gradpipe.stages.model.layers import Layer
from gradpipe.store.schema import CouplingSpec
from tests.support.cases import collecting, written
from tests.support.models import FAMILIES, random_ids, save_tiny, tiny_model
from tests.support.stores import toy_layer
from tests.support.vision import FAMILIES as IMAGE_FAMILIES
from tests.support.vision import SIZE, save_classifier, tiny_classifier

TOKENS = 12

Truth = Sequence[tuple[str, str, tuple[tuple[int, int], ...]]]


def by_head(*starts: int, width: int) -> tuple[tuple[int, int], ...]:
    """One run of outputs for each query head."""
    return tuple((start, width) for start in starts)


def of_experts(width: int) -> Truth:
    """Those of four experts: gate to down, up to down."""
    experts = [f"mlp.experts.each.{index}" for index in range(4)]
    return [(f"{x}.first.{i}", f"{x}.down.0", ((0, width),)) for x in experts for i in range(2)]


LLAMA: Truth = (
    ("self_attn.v_proj", "self_attn.o_proj", by_head(0, 0, 8, 8, width=8)),
    ("mlp.gate_proj", "mlp.down_proj", ((0, 56),)),
    ("mlp.up_proj", "mlp.down_proj", ((0, 56),)),
)
WIDE_HEADS = ("self_attn.v_proj", "self_attn.o_proj", by_head(0, 0, 16, 16, width=16))
NEOX_HEADS = by_head(16, 40, 64, 88, width=8)  # each head's q, k, v side by side
IMAGES: Truth = (
    ("attention.v_proj", "attention.o_proj", ((0, 32),)),
    ("mlp.fc1", "mlp.fc2", ((0, 56),)),
)
TRUTHS: dict[str, Truth] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": (WIDE_HEADS, *LLAMA[1:]),
    "gemma3": (WIDE_HEADS, *LLAMA[1:]),
    "phi3": (  # q 4 heads, k 2, v 2; then gate, up
        ("self_attn.qkv_proj", "self_attn.o_proj", by_head(48, 48, 56, 56, width=8)),
        ("mlp.gate_up_proj", "mlp.down_proj", ((0, 56),)),
        ("mlp.gate_up_proj", "mlp.down_proj", ((56, 56),)),
    ),
    "opt": (("self_attn.v_proj", "self_attn.out_proj", ((0, 32),)), ("fc1", "fc2", ((0, 56),))),
    "bloom": (
        ("self_attention.query_key_value", "self_attention.dense", NEOX_HEADS),
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", ((0, 128),)),
    ),
    "gpt2": (("attn.c_attn", "attn.c_proj", ((64, 32),)), ("mlp.c_fc", "mlp.c_proj", ((0, 56),))),
    "gpt_neox": (
        ("attention.query_key_value", "attention.dense", NEOX_HEADS),
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", ((0, 56),)),
    ),
    "falcon": (  # each group: its two query heads, k, v
        (
            "self_attention.query_key_value",
            "self_attention.dense",
            by_head(24, 24, 56, 56, width=8),
        ),
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", ((0, 56),)),
    ),
    "mixtral": (LLAMA[0], *of_experts(56)),
    "qwen3_moe": (WIDE_HEADS, *of_experts(24)),
    "vit": IMAGES,
    "deit": IMAGES,
}
ALL_FAMILIES = (*FAMILIES, *IMAGE_FAMILIES)


def save(family: str, folder: Path) -> Checkpoint:
    """The family's tiny checkpoint."""
    write = save_classifier if family in IMAGE_FAMILIES else save_tiny
    return Checkpoint.open(str(write(family, folder)))


def take_apart(checkpoint: Checkpoint) -> tuple[Any, Blocks, tuple[Layer, ...]]:
    """The skeleton, its blocks, and its layers, which know whose input they read."""
    found = skeletons.take_apart(checkpoint, torch.float32)
    return found.model, found.blocks, found.layers


def by_path(
    couplings: Sequence[CouplingSpec], layers: Sequence[Layer], block: str
) -> list[tuple[str, str, tuple[tuple[int, ...], ...]]]:
    """Those of one block, its layers by their modules' paths in it."""
    paths = {layer.spec.name: layer.path for layer in layers}
    ends = [(paths[x.source], paths[x.target], x.outputs) for x in couplings]
    start = block + "."
    return [
        (source.removeprefix(start), target.removeprefix(start), outputs)
        for source, target, outputs in ends
        if target.startswith(start)
    ]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_couplings_are_those_written_by_hand(family: str, tmp_path: Path) -> None:
    """In each block: v to o by head, gate and up to down, fused or not; and nothing else."""
    model, blocks, layers = take_apart(save(family, tmp_path / "model"))
    couplings = find_couplings(model, blocks, layers)
    for block in blocks.paths:
        assert sorted(by_path(couplings, layers, block)) == sorted(TRUTHS[family])
    assert len(couplings) == blocks.count * len(TRUTHS[family])


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_changed_row_moves_the_inputs_that_the_couplings_name(
    family: str, tmp_path: Path
) -> None:
    """In the real model, over several tokens; and no row moves so few inputs and is not named."""
    checkpoint = save(family, tmp_path / "model")
    skeleton, blocks, layers = take_apart(checkpoint)
    model = real_model(family, checkpoint)
    paths = {layer.spec.name: layer.path for layer in layers}
    named: dict[tuple[str, str], list[list[int]]] = {}
    for x in find_couplings(skeleton, blocks, layers):
        indices = [i for start, length in x.outputs for i in range(start, start + length)]
        named.setdefault((paths[x.source], paths[x.target]), []).append(indices)
    inside = [layer for layer in layers if layer.spec.block == 1]
    for source in inside:
        for target, moved_OI in changed_rows(model, source, inside, family).items():
            if "experts" in source.path and not moved_OI.any():
                continue  # no token came to this expert
            sequences = named.get((source.path, target), [])
            for sequence in sequences:
                for output in set(sequence):
                    followers = [j for j, i in enumerate(sequence) if i == output]
                    assert moved_OI[output].nonzero().flatten().tolist() == followers
            few = {i for i, n in enumerate(moved_OI.sum(dim=1).tolist()) if 0 < n <= 4}
            assert few == {i for sequence in sequences for i in sequence}, (source.path, target)


def real_model(family: str, checkpoint: Checkpoint) -> Any:
    """The family's tiny model with its weights, in float64, its experts one by one."""
    is_of_images = family in IMAGE_FAMILIES
    model = (tiny_classifier if is_of_images else tiny_model)(family).double()
    split_experts(model, find_sources(model, checkpoint))
    return model


def changed_rows(
    model: Any, source: Layer, targets: Sequence[Layer], family: str
) -> dict[str, Tensor]:
    """For each target, whether a changed row of source's weight moves an input, (O, I) of bools.

    All in one batch: element o has row o changed, the last none.
    """
    num_rows = source.spec.shape[0]
    change_I = torch.randn(
        source.spec.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    seen: dict[str, Tensor] = {}
    handles = []

    def change(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        sample_R = samples_of(module, inputs, num_rows + 1)
        rows = output.flatten(0, -2).clone()
        for o in range(num_rows):
            rows[sample_R == o, o] += inputs[0].flatten(0, -2)[sample_R == o] @ change_I
        return rows.reshape(output.shape)

    def see(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen[path] = moves(inputs[0], samples_of(module, inputs, num_rows + 1), num_rows)

        return hook

    handles.append(model.get_submodule(source.path).register_forward_hook(change))
    for target in targets:
        module = model.get_submodule(target.path)
        handles.append(module.register_forward_pre_hook(see(target.path)))
    with torch.no_grad():
        model(**batch_of(family, num_rows + 1))
    for handle in handles:
        handle.remove()
    return seen


def batch_of(family: str, size: int) -> dict[str, Tensor]:
    """The same sample `size` times."""
    if family in IMAGE_FAMILIES:
        pixels = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": pixels.double().expand(size, -1, -1, -1)}
    return {"input_ids": random_ids(96, 1, TOKENS, seed=0).expand(size, -1)}


def samples_of(module: nn.Module, inputs: tuple[Any, ...], size: int) -> Tensor:
    """Which sample each row of a layer's input is of; experts are told which tokens they get."""
    if isinstance(module, RoutedLinear):
        routed_R, num_tokens = inputs[1:]
        sample_R: Tensor = routed_R // (num_tokens // size)
        return sample_R
    num_rows: int = inputs[0][..., 0].numel()
    return torch.arange(num_rows) // (num_rows // size)


def moves(x: Tensor, sample_R: Tensor, num_rows: int) -> Tensor:
    """Which inputs differ from those of the last sample, (O, I); all where other tokens came."""
    by_sample = [x.flatten(0, -2)[sample_R == o] for o in range(num_rows + 1)]
    same = by_sample[-1]
    return torch.stack(
        [
            (rows - same).abs().amax(dim=0) > 1e-6
            if rows.shape == same.shape and len(rows)
            else torch.full(x.shape[-1:], len(rows) != len(same))
            for rows in by_sample[:-1]
        ]
    )


class Toy(nn.Module):
    """A model of blocks that our tests write, as transformers' models are called."""

    main_input_name = "input_ids"

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 6)
        self.blocks = nn.ModuleList(blocks)
        self.config = SimpleNamespace()

    def forward(self, input_ids: Tensor, *, use_cache: bool) -> Tensor:
        """The last block's output."""
        assert not use_cache
        x: Tensor = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return x


class Between(nn.Module):
    """Two maps, and something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 12, out: int = 12) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, out), nn.Linear(width, 6)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        """Two of between of one."""
        y: Tensor = self.two(self.between(self.one(x)))
        return y


def toy_couplings(*blocks: nn.Module, without: str = "") -> tuple[CouplingSpec, ...]:
    """What is found in a toy model of these blocks, on the meta device, `without` some layers."""
    model = Toy(*blocks).to("meta")
    layers = [
        Layer(
            path=name,
            spec=toy_layer(
                name, (module.out_features, module.in_features), block=int(name.split(".")[1])
            ),
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in without.split()
    ]
    paths = tuple(f"blocks.{index}" for index in range(len(blocks)))
    return find_couplings(model, Blocks(path="blocks", paths=paths), layers)


def runs_of(couplings: Sequence[CouplingSpec]) -> list[tuple[tuple[int, ...], ...]]:
    """The runs alone, of couplings from `one` to `two`."""
    assert {(x.source[-3:], x.target[-3:]) for x in couplings} <= {("one", "two")}
    return [x.outputs for x in couplings]


@pytest.mark.parametrize(
    ("between", "width", "runs"),
    [
        (torch.relu, 12, [((0, 12),)]),
        (lambda x: x.flip(-1)[..., :3], 3, [((11, 1), (10, 1), (9, 1))]),
        (lambda x: x[..., ::2] * x[..., 1::2].sigmoid(), 6, [(), ()]),  # gate, up side by side
        (lambda x: x[..., 4:8].repeat(1, 1, 2), 8, [((4, 4), (4, 4))]),
        (lambda x: (x.float() ** 2).to(torch.float32).softmax(0), 12, [((0, 12),)]),
        (lambda x: x.softmax(-1), 12, []),  # each follows all
        (lambda x: nn.functional.layer_norm(x, (12,)), 12, []),
        (lambda x: x[..., :4] * x[..., 4:8] * x[..., 8:], 4, []),  # each follows three
        (lambda x: x.cumsum(-1), 12, []),
        (torch.ones_like, 12, []),
        (lambda x: x[..., :6].repeat(1, 1, 2) * (torch.arange(12) % 12 > 0), 12, []),  # one is cut
    ],
)
def test_what_lies_between_two_maps_is_seen(
    between: Callable[[Tensor], Tensor], width: int, runs: list[tuple[tuple[int, int], ...]]
) -> None:
    """Orders, pairs, repeats and casts are; what mixes outputs, or drops some, is no coupling."""
    if runs == [(), ()]:
        runs = [tuple((i, 1) for i in range(first, 12, 2)) for first in (0, 1)]
    assert runs_of(toy_couplings(Between(between, width))) == runs


def test_wide_layers_are_told_apart() -> None:
    """Many pairs, of which some follow their two outputs by nearly the same amounts."""
    num = 5000

    def gate(x: Tensor) -> Tensor:
        return nn.functional.silu(x[..., :num]) * x[..., num:]

    found = runs_of(toy_couplings(Between(gate, num, 2 * num)))
    assert found == [((0, num),), ((num, num),)]


def test_of_blocks_that_look_alike_two_are_run_however_many() -> None:
    """The first and the last tell of all: no other runs, and each has the couplings."""
    ran: list[int] = []

    def between(number: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            ran.append(number)
            return x

        return run

    found = toy_couplings(*(Between(between(i)) for i in range(9)))
    assert set(ran) == {0, 8}
    assert [x.target for x in found] == [f"blocks.{i}.two" for i in range(9)]


def test_blocks_that_look_alike_and_differ_are_not_coupled() -> None:
    """What the first shows and the last does not may hold for none between."""
    straight = [Between(lambda x: x) for _ in range(2)]
    assert toy_couplings(*straight, Between(lambda x: x.flip(-1))) == ()
    assert len(toy_couplings(*straight, Between(torch.relu))) == 3


def test_a_block_that_runs_twice_is_no_error() -> None:
    """Collections refuse it by themselves, by its name."""
    block = Between(torch.relu)
    assert len(toy_couplings(block, block)) <= 2


def test_code_that_cannot_run_without_weights_is_no_error() -> None:
    """What ran before is kept; a block that was not reached has no couplings."""

    def fail(x: Tensor) -> Tensor:
        raise ValueError(f"no cache of {len(x)} rows")

    assert toy_couplings(Between(fail)) == ()
    wide = Between(torch.relu, out=13, width=13)
    assert [x.target for x in toy_couplings(wide, Between(fail))] == ["blocks.0.two"]
    assert torch.get_default_dtype() is torch.float32


def test_maps_that_are_no_layers_are_not_coupled() -> None:
    """Such as a router, which stays dense."""
    for without in ("one", "two", "one two"):
        assert toy_couplings(Between(torch.relu), without=without) == ()


def test_a_layer_that_runs_on_another_number_of_rows_is_not_coupled() -> None:
    """Rows must belong to the batch's samples, to be told apart."""
    assert toy_couplings(Between(lambda x: x.flatten(0, 1)[:5])) == ()


def test_a_store_has_couplings_whatever_it_holds(tmp_path: Path) -> None:
    """Also without second moments, and it says whose input a layer reads."""
    written(tmp_path)
    spec = collect(collecting(tmp_path, num_samples=2, statistics=("act_l2",))).spec
    block = "model.layers.1."
    couplings = [x for x in spec.couplings if x.target.startswith(block)]
    found = [(x.source, x.target, x.outputs) for x in couplings]
    assert found == [(block + source, block + target, runs) for source, target, runs in LLAMA]
    v = next(x for x in spec.layers if x.name == "model.layers.1.self_attn.v_proj")
    assert v.input_of == "model.layers.1.self_attn.q_proj"
