"""What every test may count on: one thread, fixed arithmetic, fixed examples, no network."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Read when huggingface_hub is imported, tokenizers or CUDA are first used; and by subprocesses.
os.environ |= {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import pytest
import torch
from hypothesis import settings

from tests.support.cases import Shelf, written
from tests.support.forked import Processes, processes
from tests.support.workplace import pipe, refused, stores, workplace

__all__ = ["pipe", "refused", "stores", "workplace"]  # fixtures
THIS_MACHINE = {"localhost", "127.0.0.1", "::1"}


def _refuse_network(event: str, args: tuple[object, ...]) -> None:
    """Let sockets reach this machine (moto, gloo) and nothing else."""
    if event == "socket.connect":
        address = args[1]
        if isinstance(address, tuple) and address[0] not in THIS_MACHINE:
            raise RuntimeError(f"a test tried to reach {address}: tests run without a network")


def pytest_configure() -> None:
    """Make two runs of the suite do the same arithmetic on the same examples."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    settings.register_profile("reproducible", deadline=None, derandomize=True)
    settings.load_profile("reproducible")
    sys.addaudithook(_refuse_network)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Models, samples, stores and oracles of all cases."""
    return Shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a text, to be read and not to be changed."""
    folder = tmp_path_factory.mktemp("inputs")
    return written(folder)


@pytest.fixture(scope="session")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Real processes."""
    with processes(tmp_path_factory.mktemp("logs")) as started:
        yield started


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
