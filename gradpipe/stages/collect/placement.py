"""Where the modules of a resident model lie if it fits no single device: accelerate's device maps.

A map gives devices to modules by their paths, each block whole to one. accelerate moves what passes
between them, and each layer's sums lie where its weights do. A map by name is made by accelerate,
which knows weights alone: it is told of less memory than is free, by as much as the sums need.
What would be offloaded is refused: autograd keeps every weight that is copied to a GPU until the
backward pass has used it, so that all of them would be there at once.

Source: https://huggingface.co/docs/accelerate/concept_guides/big_model_inference
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradpipe.errors import InputError
from gradpipe.stages.collect.estimate import free_bytes, sum_bytes
from gradpipe.stages.model.skeleton import Skeleton

MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # as from_pretrained takes them
_ROOM = 0.9  # of the free memory: the rest is for activations


@dataclass(frozen=True, slots=True)
class Placement:
    """The device of each module, under its path or that of a module around it."""

    devices: Mapping[str, torch.device]

    @property
    def main(self) -> torch.device:
        """Where batches are put: the first module's."""
        return next(iter(self.devices.values()))

    @property
    def device_map(self) -> dict[str, str] | None:
        """As accelerate takes it; None for a model that is whole."""
        if "" in self.devices:
            return None
        return {path: str(device) for path, device in self.devices.items()}

    def of(self, path: str) -> torch.device:
        """The device of a module, or of a parameter; KeyError if the map leaves it out."""
        while path not in self.devices:
            if not path:
                raise KeyError(path)
            path = path.rpartition(".")[0]
        return self.devices[path]


def place(skeleton: Skeleton, asked: str, statistics: tuple[str, ...]) -> Placement:
    """The map that is asked for: by name, or in a JSON file.

    Raises InputError for one that is not this model's, or that has devices which are not there; if
    the model does not fit; and if accelerate is not installed.
    """
    try:
        import accelerate  # noqa: F401, PLC0415 (slow, and only needed here)
    except ImportError as error:
        raise InputError(
            f"--device-map {asked} needs accelerate: pip install 'gradpipe[device-map]'"
        ) from error
    found = _inferred(skeleton, asked, statistics) if asked in MAPS else _read(Path(asked))
    placement = Placement({path: _device(asked, path, value) for path, value in found.items()})
    if mistake := next(_mistakes(skeleton, placement), None):
        raise InputError(f"--device-map {asked}: {mistake}")
    return placement


def dispatch(model: Any, placement: Placement) -> None:
    """Give a model that lies so accelerate's hooks, which move what comes into each module."""
    device_map = placement.device_map
    if device_map is None:
        return
    from accelerate import dispatch_model  # noqa: PLC0415 (as above)
    from accelerate.hooks import remove_hook_from_submodules  # noqa: PLC0415

    remove_hook_from_submodules(model)  # from_pretrained's, of the model before it was split
    skip = getattr(model, "_skip_keys_device_placement", None)
    main = str(placement.main)
    dispatch_model(model, device_map, main_device=main, skip_keys=skip, force_hooks=True)


def _inferred(skeleton: Skeleton, asked: str, statistics: tuple[str, ...]) -> dict[str, Any]:
    """As accelerate spreads weights over the GPUs, or over the host's memory if there are none."""
    from accelerate import infer_auto_device_map  # noqa: PLC0415 (as above)
    from accelerate.utils import get_balanced_memory  # noqa: PLC0415

    model, share = skeleton.model, _ROOM * _share_of_weights(skeleton, statistics)
    memory = {device: int(share * free) for device, free in _memory().items()}
    devices = set(memory)
    whole = sorted({type(model.get_submodule(path)).__name__ for path in skeleton.blocks.paths})
    if asked != "sequential":
        is_low = asked == "balanced_low_0"
        memory = get_balanced_memory(model, memory, whole, low_zero=is_low)
    found: dict[str, Any] = infer_auto_device_map(model, memory, whole)
    if out := [path or "the model" for path, device in found.items() if device not in devices]:
        raise InputError(
            f"--device-map {asked}: {out[0]} does not fit beside the sums: give fewer "
            "--statistics, or --schedule streamed"
        )
    return found


def _memory() -> dict[int | str, int]:
    """Free bytes of each GPU; of the host if there are none."""
    gpus = range(torch.cuda.device_count())
    found: dict[int | str, int] = {x: free_bytes(torch.device("cuda", x)) for x in gpus}
    return found or {"cpu": free_bytes(torch.device("cpu"))}


def _share_of_weights(skeleton: Skeleton, statistics: tuple[str, ...]) -> float:
    """Of what a resident run keeps of a model, weights and sums."""
    weights = sum(x.numel() * x.element_size() for x in skeleton.model.parameters())
    sums = sum(sum_bytes(layer.spec, statistics) for layer in skeleton.layers)
    return float(weights / (weights + sums))


def _read(file: Path) -> dict[str, Any]:
    """A map in a file; InputError if it is none."""
    expected = f"expected {', '.join(MAPS)}, or a JSON file of modules and their devices"
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--device-map {file}: {expected}") from error
    if not isinstance(found, dict) or not found:
        raise InputError(f"--device-map {file}: {expected}")
    return found


def _device(asked: str, path: str, value: object) -> torch.device:
    """`cpu`, or a GPU that is there, as its number or as `cuda:1`."""
    count = torch.cuda.device_count()
    names = {name: torch.device("cuda", x) for x in range(count) for name in (str(x), f"cuda:{x}")}
    names["cpu"] = torch.device("cpu")
    if isinstance(value, bool) or str(value) not in names:
        raise InputError(
            f"--device-map {asked}: {path} is on {value!r:.80}: expected cpu, or cuda:N, of which "
            f"{count} are here"
        )
    return names[str(value)]


def _mistakes(skeleton: Skeleton, placement: Placement) -> Iterator[str]:
    """What is wrong with a map for this model."""
    model: nn.Module = skeleton.model
    modules = {path for path, _ in model.named_modules(remove_duplicate=False)}
    for path in placement.devices:
        if path not in modules:
            yield f"{path} is no module of the model"
        if block := next((x for x in skeleton.blocks.paths if path.startswith(f"{x}.")), None):
            yield f"{path} is a part of block {block}, which must be whole on one device"
    if len({device.type for device in placement.devices.values()}) > 1:
        yield "cpu beside GPUs would be offloaded: expected GPUs alone, or cpu alone"
    places = dict[int, torch.device]()
    tensors = chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    for name, tensor in tensors:
        try:
            device = placement.of(name)
        except KeyError:
            yield f"{name} has no device"
            return
        if places.setdefault(id(tensor), device) != device:
            yield f"{name} is tied to a tensor on another device"
