"""The reference implementation's gradient files, read without running what is in them.

`gradients_aggregrate_norm_l1_model_*.pth` is a dict of float16 tensors keyed
`self_attn.q_proj_layer_0`: Σ|100·G| over the samples; the `_l2_` file holds √Σ(100·G)².
Source: VILA-Lab/GBLM-Pruner, gradient_computation.py.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from gradpipe.errors import InputError
from gradpipe.stages.checkpoint import Checkpoint
from gradpipe.store.objects import digest
from gradpipe.store.schema import LayerSpec

_KEY = re.compile(r"(?P<module>.+)_layer_(?P<block>\d+)")


def read_gblm_file(path: Path, statistic: str, scale: float) -> dict[str, npt.NDArray[np.float32]]:
    """Float32 sums (`grad_l1` or `grad_l2`) by the file's own keys, (out, in) each.

    `scale` is what the reference multiplied its gradients by. Raises InputError if the file is
    not one of the reference's.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{path}: expected a file of tensors that GBLM-Pruner wrote: {reason}"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and _KEY.fullmatch(key) and isinstance(value, torch.Tensor)
        for key, value in tensors.items()
    ):
        raise InputError(f"{path}: expected a dict of tensors keyed like self_attn.q_proj_layer_0")
    sums = {}
    for key, tensor in tensors.items():
        values = tensor.float() / scale
        if not bool(torch.isfinite(values).all()):
            raise InputError(
                f"{path}: {key} holds NaN or infinite values (float16 overflow): compute it again"
            )
        sums[key] = (values.square() if statistic == "grad_l2" else values).numpy()
    return sums


def match_layers(keys: set[str], checkpoint: Checkpoint) -> dict[str, LayerSpec]:
    """The checkpoint's layer behind each of the file's keys; InputError names one without."""
    layers = {}
    for key in keys:
        match = _KEY.fullmatch(key)
        assert match is not None  # read_gblm_file let no other key through
        tail = f".{match['block']}.{match['module']}.weight"
        found = [k for k, info in checkpoint.tensors.items() if k.endswith(tail) and info.is_matrix]
        if len(found) != 1:
            raise InputError(
                f"{key}: {checkpoint.name} has {len(found)} tensors *{tail}, expected one"
            )
        layers[key] = LayerSpec(
            name=found[0].removesuffix(".weight"),
            weight_key=found[0],
            shape=checkpoint.tensors[found[0]].shape,
            block=int(match["block"]),
            transposed=False,  # the reference knows LLaMA alone
            digest=digest(checkpoint.read_bytes(found[0])),
        )
    return layers
