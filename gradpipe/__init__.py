"""gradpipe: one-shot pruning of large language models from gradients.

Stage one, `collect`, streams calibration samples once through a model and writes a gradient
store. Stage two, `prune`, sparsifies the checkpoint from the store, at as many sparsities as
asked, and never runs the model.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text("utf-8"))  # for type checkers too
_HOMES = {  # public name -> its module
    alias.name: str(node.module)
    for node in _STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `import gradpipe` loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gradpipe' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
