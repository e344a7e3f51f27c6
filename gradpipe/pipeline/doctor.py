"""What this machine has, and what a collection with no options would do with a model on it."""

import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

import torch

from gradpipe.pipeline.collect.config import CollectConfig
from gradpipe.pipeline.collect.run import examine
from gradpipe.pipeline.reports.results import Health
from gradpipe.stages.collect.estimate import free_bytes

_PACKAGES = ("gradpipe", "torch", "transformers", "zarr", "numcodecs")


def diagnose(model: str | None = None) -> Health:
    """Look at the machine, and at a model if one is given, of which no weight is read.

    Raises InputError for a model that cannot be collected, as far as its config tells.
    """
    cuda = range(torch.cuda.device_count())
    gpus = {f"cuda:{index}": torch.cuda.get_device_name(index) for index in cuda}
    devices = {"cpu": f"{os.cpu_count()} cores", **gpus}
    return Health(
        versions={"python": platform.python_version(), **{x: version(x) for x in _PACKAGES}},
        devices=devices,
        free_memory={name: free_bytes(torch.device(name)) for name in devices},
        free_disk=shutil.disk_usage(Path.cwd()).free,
        model=None if model is None else examine(CollectConfig(model=model, store=Path("store"))),
    )
