"""gradpipe: one-shot pruning of large language models from gradients.

Stage one, `collect`, streams calibration samples once through a model and writes a gradient
store. Stage two, `prune`, sparsifies the checkpoint from the store, at as many sparsities as
asked, and never runs the model.
"""

import lazy_loader

# What `__init__.pyi` imports, brought when it is first asked for: `pipe` answers signals, and
# `import gradpipe` returns, before torch and transformers are loaded.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
