"""How long a model takes here, to read a prompt (prefill) and for each new token; and its size.

Medians of a few runs after one that is not counted, one sequence at a time, greedy. With weights
2:4 sparse, and a GPU whose tensor cores know the pattern, also by `to_sparse_semi_structured`.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from numcodecs.zstd import Zstd
from torch import Tensor, nn

from gradpipe.stages.checkpoint.folder import Checkpoint

_REPEATS = 3
NEW_TOKENS = 16  # decoded after the prompt
_CACHES = ("past_key_values", "cache_params", "state")  # of attention, Mamba, RWKV
_FIRST_CAPABILITY = (8, 0)  # Ampere
_MULTIPLE = 64  # of both widths: the sparse kernels' tiles
_CHUNK_BYTES = 16 << 20
_ZSTD_LEVEL = 3  # the tool's own default


@torch.no_grad()
def measure_speed(model: Any, prompt_T: Tensor) -> tuple[float, float]:
    """Time `model` on token ids: median seconds of the whole prompt, and of each new token."""
    ids_1T = prompt_T[None].to(model.device)
    model(input_ids=ids_1T, use_cache=True)  # what is done once, is done
    rounds = [_round(model, ids_1T) for _ in range(_REPEATS)]
    return median(prefill for prefill, _ in rounds), median(decode for _, decode in rounds)


def _round(model: Any, ids_1T: Tensor) -> tuple[float, float]:
    output, prefill = _timed(model.device, lambda: model(input_ids=ids_1T, use_cache=True))

    def decode() -> None:
        step, read_1T = output, ids_1T
        for _ in range(NEW_TOKENS):
            next_11, cache = step.logits[:, -1:].argmax(-1), _cache_of(step)
            read_1T = torch.cat((read_1T, next_11), dim=1)
            step = model(input_ids=next_11 if cache else read_1T, use_cache=True, **cache)

    _, seconds = _timed(model.device, decode)
    return prefill, seconds / NEW_TOKENS


def _cache_of(output: Any) -> dict[str, Any]:
    """What a model keeps of the tokens it has read, as it takes it; nothing if it keeps nothing."""
    found = {name: getattr(output, name, None) for name in _CACHES}
    return {name: cache for name, cache in found.items() if cache is not None}


def _timed(device: torch.device, work: Callable[[], Any]) -> tuple[Any, float]:
    _wait(device)
    start = time.perf_counter()
    found = work()
    _wait(device)
    return found, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compress_2_4(model: Any) -> int:
    """Give each 2:4 sparse linear layer torch's compressed weight; returns how many there are.

    None where the device has no such kernels: CUDA from Ampere on, in float16 or bfloat16.
    """
    device: torch.device = model.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _FIRST_CAPABILITY:
        return 0
    found = [x for x in model.modules() if isinstance(x, nn.Linear) and _is_2_4(x.weight)]
    for module in found:
        weight = torch.sparse.to_sparse_semi_structured(module.weight.detach())
        module.weight = nn.Parameter(weight, requires_grad=False)
    return len(found)


def _is_2_4(weight_OI: Tensor) -> bool:
    fits = weight_OI.ndim == 2 and not any(x % _MULTIPLE for x in weight_OI.shape)
    if not fits or weight_OI.dtype not in {torch.float16, torch.bfloat16}:
        return False
    return bool(((weight_OI != 0).reshape(-1, 4).sum(1) <= 2).all())


def file_sizes(checkpoint: Checkpoint) -> tuple[int, int]:
    """Bytes of the safetensors files: as they are, and compressed in chunks of 16 MiB."""
    plain, packed, codec = 0, 0, Zstd(level=_ZSTD_LEVEL)
    for name in checkpoint.files:
        with (checkpoint.folder / name).open("rb") as file:
            while data := file.read(_CHUNK_BYTES):
                plain += len(data)
                packed += len(codec.encode(data))
    return plain, packed
