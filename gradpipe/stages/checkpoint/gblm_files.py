"""The reference implementation's gradient files, read without running what is in them.

`gradients_aggregrate_norm_l1_model_*.pth` is a dict of float16 tensors keyed
`self_attn.q_proj_layer_0`: Σ|100·G| over the samples; the `_l2_` file holds √Σ(100·G)².
Source: VILA-Lab/GBLM-Pruner, gradient_computation.py.
"""

import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradpipe.errors import InputError
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.store.objects import digest
from gradpipe.store.schema import LayerSpec
from gradpipe.store.statistics import STATISTICS

_KEY = re.compile(r"(?P<module>.+)_layer_(?P<block>\d+)")


def read_gblm_file(path: Path, statistic: str, scale: float) -> dict[str, npt.NDArray[np.float32]]:
    """Float32 sums (`grad_l1` or `grad_l2`) by the file's own keys, (out, in) each.

    `scale` is what the reference multiplied its gradients by. Raises InputError if the file is
    not one of the reference's.
    """
    sums = {}
    for key, tensor in _tensors(path).items():
        values = tensor.detach().float() / scale  # it may be a parameter
        if not bool(torch.isfinite(values).all()):
            raise InputError(
                f"{path}: {key} holds NaN or infinite values (float16 overflow): compute it again"
            )
        if bool((values < 0).any()):
            raise InputError(
                f"{path}: {key} holds negative values, expected norms: compute it again"
            )
        sums[key] = (values.square() if STATISTICS[statistic].is_squared else values).numpy()
    return sums


def _tensors(path: Path) -> dict[str, Tensor]:
    """What the file holds, checked to be dense float tensors under the reference's keys."""
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected a .pth file that GBLM-Pruner wrote")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of what is no tensor
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage, or code, which torch does not run
        raise InputError(
            f"{path}: not a whole file of tensors alone ({type(error).__name__}; nothing in it was "
            "run): expected what GBLM-Pruner wrote: copy or compute it again"
        ) from error
    if isinstance(tensors, dict) and tensors and all(_is_entry(k, v) for k, v in tensors.items()):
        return tensors
    raise InputError(
        f"{path}: expected a dict of float tensors keyed like self_attn.q_proj_layer_0"
    )


def _is_entry(key: object, value: object) -> bool:
    """A key of the reference's, and a tensor that is as large as its file says."""
    return (
        isinstance(key, str)
        and _KEY.fullmatch(key) is not None
        and isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and value.is_floating_point()
        and value.numel() * value.itemsize <= value.untyped_storage().nbytes()
    )


def match_layers(keys: set[str], checkpoint: Checkpoint) -> dict[str, LayerSpec]:
    """The checkpoint's layer behind each of the file's keys; InputError names one without."""
    layers = {}
    for key in sorted(keys):
        match = _KEY.fullmatch(key)
        assert match is not None  # read_gblm_file let no other key through
        tail = f".{match['block']}.{match['module']}.weight"
        found = [k for k, info in checkpoint.tensors.items() if k.endswith(tail) and info.is_matrix]
        if len(found) != 1:
            raise InputError(
                f"{key}: {checkpoint.name} has {len(found)} tensors *{tail}, expected one: "
                "give the model that the file was computed from"
            )
        spec = checkpoint.layer_spec(found[0], int(match["block"]))  # LLaMA's: never transposed
        layers[key] = replace(spec, digest=digest(checkpoint.read_bytes(found[0])))
    return layers
