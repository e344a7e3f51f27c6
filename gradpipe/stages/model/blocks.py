"""The repeated blocks of a model: the module list that its forward pass runs through.

No table of architectures: of the lists that hold linear maps, within no other one, and that a pass
over a sample runs, the blocks are the one with most parameters. So the experts of one layer are
not taken for blocks, nor is a vision tower when text is run. The blocks may be of several classes.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradpipe.errors import InputError, did_you_mean
from gradpipe.stages.checkpoint.tensors import owners
from gradpipe.stages.model.trial import Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The repeated blocks of a model, in order: where they are, whichever instance of it."""

    path: str  # of their list: `model.layers`
    paths: tuple[str, ...]  # of those that run, such as `model.layers.0`

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.paths)

    def index(self, path: str) -> int | None:
        """The number of the block that a module is in; None for one outside the blocks."""
        inside = (i for i, block in enumerate(self.paths) if path.startswith(f"{block}."))
        return next(inside, None)


def find_blocks(
    model: nn.Module, linears: Collection[str], trial: Trial, path: str | None = None
) -> Blocks:
    """The repeated blocks: those at `path`, else those that the trial has found to run.

    `linears` are the paths of the model's linear maps.
    Raises InputError that says what was looked for.
    """
    holders = {owner for path in linears for owner in owners(path)}
    lists = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name in holders
    }
    outer = [name for name in lists if not any(name.startswith(f"{x}.") for x in lists)]
    running = [name for name in outer if _runs(name, lists[name], trial)]
    if path is not None:
        if path not in lists:
            raise InputError(
                f"--blocks {path}: expected the path of a list of blocks with linear layers; "
                f"this model has {', '.join(outer) or 'none'}{did_you_mean(path, outer)}"
            )
        if running and not _runs(path, lists[path], trial):
            raise InputError(
                f"--blocks {path}: a sample does not run through it: give one of "
                f"{', '.join(running)}"
            )
        return _running(path, lists[path], trial)
    if not outer:
        raise InputError(
            f"no blocks found in {type(model).__name__}: looked for an nn.ModuleList whose "
            "modules hold linear layers; name its path with --blocks PATH"
        )
    sizes = {name: num_parameters(model.get_submodule(name)) for name in outer}
    near = {name: 0 if running else _steps_with_embedding(model, name) for name in outer}
    found = max(running or outer, key=lambda name: (near[name], sizes[name]))
    return _running(found, lists[found], trial)


def _steps_with_embedding(model: Any, path: str) -> int:
    """How far the way to a list is that to the tokens' embedding: text runs through what is near.

    It tells where a pass without values does not come as far as the blocks.
    """
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # of a model that reads no tokens
        return 0
    places = [name for name, module in model.named_modules() if module is embedding]
    beside = (zip(place.split("."), path.split("."), strict=False) for place in places)
    return max((sum(a == b for a, b in pairs) for pairs in beside), default=0)


def _running(path: str, count: int, trial: Trial) -> Blocks:
    """Those of a list that run, as far as is known: text passes by the blocks that read images."""
    paths = tuple(f"{path}.{index}" for index in range(count))
    running = tuple(x for x in paths if x in trial.times)
    return Blocks(path=path, paths=running if running and trial.error is None else paths)


def _runs(path: str, count: int, trial: Trial) -> bool:
    return any(f"{path}.{index}" in trial.times for index in range(count))


def num_parameters(module: nn.Module) -> int:
    """Of all its parameters, how many values."""
    return sum(parameter.numel() for parameter in module.parameters())
