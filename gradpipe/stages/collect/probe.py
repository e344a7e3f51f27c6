"""A short pass of the real model before a collection, to see that it is what it is taken for.

Of a language model only the first blocks run, one of each class. The weights of one block at a time
are in memory: the same for either schedule, so that both give the same verdict.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from gradpipe.stages.collect.block_weights import WeightLoader
from gradpipe.stages.model.own_loss import check_next_token, check_one_image
from gradpipe.stages.model.skeleton import Skeleton
from gradpipe.stages.model.tasks import find_task
from gradpipe.store.schema import IMAGE_CLASSIFICATION


def probe(skeleton: Skeleton, device: torch.device) -> None:
    """Raises InputError for a model that does not run, or whose loss is not its task's."""
    loader, name = WeightLoader(skeleton, device), skeleton.checkpoint.name
    with (
        loader.loaded("", excluded=skeleton.blocks.path + "."),
        _loading_blocks(skeleton, loader),
    ):
        if find_task(skeleton.checkpoint) == IMAGE_CLASSIFICATION:
            check_one_image(skeleton.model, name, device)
            return
        with _shortened(skeleton):
            check_next_token(skeleton.model, name, device)


@contextmanager
def _shortened(skeleton: Skeleton) -> Iterator[None]:
    """The model ends after the block that is the first of the last class to appear."""
    owner, _, name = skeleton.blocks.path.rpartition(".")
    blocks: Any = skeleton.model.get_submodule(skeleton.blocks.path)
    kinds = [type(block) for block in blocks]
    depth = 1 + max(kinds.index(kind) for kind in kinds)
    setattr(skeleton.model.get_submodule(owner), name, nn.ModuleList(blocks[:depth]))
    try:
        yield
    finally:
        setattr(skeleton.model.get_submodule(owner), name, blocks)


@contextmanager
def _loading_blocks(skeleton: Skeleton, loader: WeightLoader) -> Iterator[None]:
    """Each block has its weights while it runs, and not longer."""
    with ExitStack() as hooks, ExitStack() as loaded:
        for path in skeleton.blocks.paths:
            block = skeleton.model.get_submodule(path)

            def load(*_: object, prefix: str = path + ".") -> None:
                loaded.enter_context(loader.loaded(prefix))

            def free(*_: object) -> None:
                loaded.close()

            hooks.enter_context(block.register_forward_pre_hook(load))
            hooks.enter_context(block.register_forward_hook(free))
        yield
