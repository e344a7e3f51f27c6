"""Which of a store's layers are meant."""

import re

from gradpipe.errors import InputError
from gradpipe.store.reader import GradientStore
from gradpipe.store.schema import LayerSpec


def chosen_layers(store: GradientStore, pattern: str | None) -> tuple[LayerSpec, ...]:
    """Those whose names `pattern` is found in; InputError if there are none."""
    layers = store.spec.layers
    found = tuple(x for x in layers if pattern is None or re.search(pattern, x.name))
    if not found:
        raise InputError(
            f"--layer {pattern}: none of {len(layers)} layers, such as {layers[0].name}: give a "
            "regular expression that is found in their names"
        )
    return found
