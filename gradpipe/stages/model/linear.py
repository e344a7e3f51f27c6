"""Which modules are linear maps, y = W x: by what they compute, not by what they inherit from."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from gradpipe.stages.model.experts import RoutedLinear


def linear_maps(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model whose `weight` is one matrix applied to the last dimension, by path.

    One with a forward of its own is tried: it may be grouped, or return a tuple.
    """
    tried: dict[tuple[type, int, int], bool] = {}
    found = {}
    for path, module in model.named_modules():
        is_linear = isinstance(module, Conv1D | RoutedLinear)
        if isinstance(module, nn.Linear):
            kind = (type(module), module.in_features, module.out_features)
            if kind not in tried:
                tried[kind] = kind[0].forward is nn.Linear.forward or _computes_linear(module)
            is_linear = tried[kind]
        if is_linear:
            found[path] = module
    return found


@torch.no_grad()
def _computes_linear(module: nn.Linear) -> bool:
    """Try it on two tokens, with random weights."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = {n: random(*p.shape) for n, p in module.named_parameters()}
    x_BTI = random(1, 2, module.in_features)
    try:
        found = torch.func.functional_call(module, weights, (x_BTI,))
    except Exception:  # noqa: BLE001 (it may want other arguments, or weights of another type)
        return False
    expected = linear(x_BTI, weights["weight"], weights.get("bias"))
    is_alike = isinstance(found, Tensor) and found.shape == expected.shape
    return is_alike and torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
