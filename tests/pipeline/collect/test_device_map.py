"""A resident model that is spread over devices: the bytes of one that is whole, or refused."""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook

from gradpipe import collect
from gradpipe.errors import InputError
from gradpipe.pipeline.collect.config import CollectConfig
from gradpipe.pipeline.collect.run import examine
from gradpipe.pipeline.reports.tables import plan_table
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.collect import estimate, placement
from gradpipe.stages.collect.placement import MAPS, Placement, place
from gradpipe.stages.model.skeleton import Skeleton, take_apart
from tests.support.cases import GPT2, LLAMA, MIXTRAL, SEQ_LEN, VIT, Case, Shelf, files_of
from tests.support.workplace import COLLECT, Refused

SPREAD = f"{COLLECT} --schedule resident --device-map"
LAYERS = ("model.layers.0", "model.layers.1")
WHOLE = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
WHOLE |= dict.fromkeys((*LAYERS, "lm_head"), "cpu")


def written(folder: Path, devices: Mapping[str, object]) -> str:
    """A file with a map."""
    (folder / "map.json").write_text(json.dumps(devices))
    return str(folder / "map.json")


def every_module(case: Case, devices: tuple[str, ...] = ("cpu",)) -> dict[str, str]:
    """An entry for each block, and for each module outside that has tensors; devices in turn."""
    model = case.model()
    blocks = [path for path, _ in model.named_modules() if path.endswith((".0", ".1"))]
    blocks = [path for path in blocks if path.count(".") == min(x.count(".") for x in blocks)]
    others = [
        path
        for path, module in model.named_modules()
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    ]
    outside = [x for x in others if not any(f"{x}.".startswith(f"{y}.") for y in blocks)]
    halves = {path: devices[i * len(devices) // len(blocks)] for i, path in enumerate(blocks)}
    return dict.fromkeys(outside, devices[0]) | halves


@pytest.mark.parametrize("case", [LLAMA, GPT2, MIXTRAL, VIT], ids=str)
def test_a_dispatched_model_gives_the_bytes_of_a_whole_one(
    case: Case, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With accelerate's hooks on each module, fused experts and a head among them.

    On the CPU the hooks move nothing, but they wrap all that runs: two devices need GPUs.
    """
    moved, usual = set[type](), AlignDevicesHook.pre_forward

    def noted(hook: AlignDevicesHook, module: torch.nn.Module, *inputs: Any, **named: Any) -> Any:
        moved.add(type(module))
        return usual(hook, module, *inputs, **named)

    head = ("lm_head",) if case.family in {"llama", "mixtral"} else ()
    root, more = shelf.root(case), {"statistics": ("grad_l1",), "include": head}
    whole = collect(case.collecting(root, tmp_path / "whole", **more))
    monkeypatch.setattr(AlignDevicesHook, "pre_forward", noted)
    spread = written(tmp_path, every_module(case))
    collect(case.collecting(root, tmp_path / "spread", device_map=spread, **more))
    assert len(moved) > 3
    assert files_of(tmp_path / "spread") == files_of(tmp_path / "whole")
    assert "device-map" not in whole.spec.command


@pytest.mark.parametrize("name", MAPS)
def test_without_a_gpu_every_name_is_the_whole_model_on_the_cpu(name: str, llama: Skeleton) -> None:
    """All that there is to give is one device."""
    found = place(llama, name, ("grad_l1",))
    assert found == Placement({"": torch.device("cpu")})
    assert found.device_map is None


@pytest.fixture(scope="module")
def llama(shelf: Shelf) -> Skeleton:
    """The tiny Llama, taken apart."""
    return take_apart(Checkpoint.open(str(shelf.root(LLAMA) / "model")), torch.float32)


def pretend_gpus(patch: pytest.MonkeyPatch, *free: int) -> None:
    """As many GPUs, with so much free memory; nothing can be put on them."""
    patch.setattr(torch.cuda, "device_count", lambda: len(free))
    patch.setattr(placement, "free_bytes", lambda device: free[device.index])


def test_a_map_leaves_room_for_the_sums(llama: Skeleton, monkeypatch: pytest.MonkeyPatch) -> None:
    """All fits one GPU but for the sums: the blocks are spread, each whole, no tensor left out."""
    weights = sum(x.numel() * 4 for x in llama.model.parameters())
    pretend_gpus(monkeypatch, 3 * weights, 9 * weights)
    with_few = place(llama, "sequential", ("act_l2",))
    assert {x.index for x in with_few.devices.values()} == {0}
    with_many = place(llama, "sequential", ("grad_l1", "grad_l2", "hessian"))
    assert {x.index for x in with_many.devices.values()} == {0, 1}
    for path in llama.blocks.paths:
        assert len({with_many.of(name) for name in (path, f"{path}.mlp.up_proj")}) == 1


def test_what_fits_no_gpu_is_refused(llama: Skeleton, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be offloaded, and autograd would keep the weights that are copied to a GPU."""
    pretend_gpus(monkeypatch, 20_000, 20_000)
    with pytest.raises(InputError, match=r"does not fit beside the sums: .*--schedule streamed"):
        place(llama, "auto", ("grad_l1",))


def test_cpu_beside_gpus_is_refused(
    llama: Skeleton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be offloaded; so would what a map says is on disk."""
    pretend_gpus(monkeypatch, 10**9)
    with pytest.raises(InputError, match=r"cpu beside GPUs would be offloaded"):
        place(llama, written(tmp_path, WHOLE | {"lm_head": 0}), ("grad_l1",))
    with pytest.raises(InputError, match=r"lm_head is on 'disk': expected cpu, or cuda:N"):
        place(llama, written(tmp_path, WHOLE | {"lm_head": "disk"}), ("grad_l1",))


@pytest.mark.parametrize(
    ("devices", "says"),
    [
        ({"model.layers.0": "cpu"}, "model.embed_tokens.weight has no device"),
        (WHOLE | {"model.layer": "cpu"}, "model.layer is no module of the model"),
        (WHOLE | {"model.layers.0.mlp": "cpu"}, "is a part of block model.layers.0"),
        (WHOLE | {"lm_head": "cuda:7"}, "lm_head is on 'cuda:7': expected cpu, or cuda:N"),
        (WHOLE | {"lm_head": True}, "lm_head is on True: expected cpu, or cuda:N"),
        ({}, "a JSON file of modules"),
    ],
)
def test_a_map_of_something_else_is_refused(
    refused: Refused, tmp_path: Path, devices: Mapping[str, object], says: str
) -> None:
    """A module, a tensor or a device that is not there; a block cut in two."""
    refused(SPREAD, written(tmp_path, devices), says=("--device-map", says))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (f"{COLLECT} --device-map auto", "--device-map auto: without --schedule resident"),
        (f"{COLLECT} --schedule streamed --device-map auto", "--device-map auto: without"),
        (f"{SPREAD} auto --device cpu", "--device cpu: --device-map auto gives the devices"),
        (f"{SPREAD} ballanced", "--device-map ballanced: expected auto, balanced"),
        (f"{SPREAD} text.txt", "--device-map text.txt: expected auto, balanced"),
    ],
)
def test_a_map_that_cannot_be_meant_is_refused(refused: Refused, command: str, says: str) -> None:
    """Another schedule, another device, no name and no file of a map."""
    refused(command, says=(says,))


def test_without_accelerate_it_says_what_to_install(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else needs it."""
    monkeypatch.setitem(sys.modules, "accelerate", None)
    refused(f"{SPREAD} auto", says=("needs accelerate: pip install 'gradpipe[device-map]'",))


@pytest.mark.parametrize("case", [LLAMA, GPT2, MIXTRAL], ids=str)
def test_a_plan_says_what_each_device_needs(
    case: Case, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a naive count; together they need what the whole model does, and the table names each."""
    pretend_gpus(monkeypatch, 3 << 30, 7 << 30)
    monkeypatch.setattr(estimate, "free_bytes", lambda x: (7 << 30) if x.index else (3 << 30))
    devices = every_module(case, ("cuda:0", "cuda:1"))
    root = shelf.root(case)
    config = case.collecting(root, tmp_path / "store", statistics=("grad_l1",), batch_size=2)
    report = examine(replace(config, device_map=written(tmp_path, devices)))
    shares = report.estimate.shares
    assert {name: x.free_bytes >> 30 for name, x in shares.items()} == {"cuda:0": 3, "cuda:1": 7}
    assert report.estimate.free_bytes == 10 << 30
    whole = examine(replace(config, device="cpu")).estimate
    assert sum(x.needed_bytes for x in shares.values()) == whole.resident_bytes
    block = next(x for x, device in devices.items() if device == "cuda:1")
    weights = sum(x.numel() for x in case.model().get_submodule(block).parameters())
    skeleton = take_apart(Checkpoint.open(config.model), torch.float32)
    sums = sum(x.spec.num_weights for x in skeleton.layers if x.spec.block == 1)
    widths = sum(sum(x.spec.shape) for x in skeleton.layers if x.spec.block == 1)
    graph = 2 * SEQ_LEN * (widths + 12 * 32)
    assert shares["cuda:1"].needed_bytes == 4 * (weights + sums + graph)
    rows = dict(zip(*(column.cells for column in plan_table(report).columns), strict=True))
    assert str(rows["  on cuda:1"]) == "0.00 GiB of 7.00 GiB free"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device")
@pytest.mark.parametrize("case", [LLAMA, MIXTRAL], ids=str)
def test_two_gpus_give_the_bytes_of_one(case: Case, shelf: Shelf, tmp_path: Path) -> None:
    """By a map that has half of the blocks on each, and by name; both go on from each other."""
    root = shelf.root(case)

    def spread(name: str, **more: object) -> CollectConfig:
        return case.collecting(root, tmp_path / name, include=("lm_head",), **more)

    one = collect(spread("one", device="cuda:0"))
    by_file = written(tmp_path, every_module(case, ("cuda:0", "cuda:1")))
    assert collect(spread("file", device_map=by_file)).digest == one.digest
    by_name = collect(spread("name", device_map="balanced"))
    for layer in one.spec.layers:
        for statistic in one.spec.statistics:
            ours, theirs = (x.read_norms(layer, statistic) for x in (by_name, one))
            np.testing.assert_array_equal(ours, theirs)
