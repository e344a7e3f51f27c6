"""gradpipe: one-shot pruning of large language models from gradients.

Stage one, `collect`, streams calibration samples once through a model and writes a gradient
store. Stage two, `prune`, sparsifies the checkpoint from the store, at as many sparsities as
asked, and never runs the model.
"""

from importlib import import_module
from typing import Any

_HOMES = {  # name -> its module; `__init__.pyi` tells type checkers the same
    "Accuracy": "pipeline.reports.results",
    "CollectConfig": "pipeline.collect.config",
    "DataConfig": "stages.data.config",
    "DemoResult": "pipeline.reports.results",
    "EvalConfig": "pipeline.evaluate_config",
    "GradientStore": "store.reader",
    "GradpipeError": "errors",
    "ImportConfig": "pipeline.collect.config",
    "InputError": "errors",
    "Interrupted": "errors",
    "LayerResult": "pipeline.reports.results",
    "Metrics": "pipeline.reports.results",
    "PointResult": "pipeline.reports.points",
    "PruneConfig": "pipeline.prune.config",
    "PruneResult": "pipeline.reports.results",
    "ReportConfig": "pipeline.report_config",
    "Shard": "store.shard",
    "StoreError": "errors",
    "SweepConfig": "pipeline.sweep.config",
    "Verified": "pipeline.verify",
    "apply_masks": "pipeline.masks",
    "classify": "pipeline.evaluate",
    "collect": "pipeline.collect.run",
    "collect_shard": "pipeline.collect.run",
    "demo": "pipeline.demo",
    "evaluate": "pipeline.evaluate",
    "export_masks": "pipeline.masks",
    "import_gblm": "pipeline.collect.import_gblm",
    "merge": "pipeline.collect.merge",
    "open_store": "store.reader",
    "plan": "pipeline.collect.run",
    "prune": "pipeline.prune.run",
    "report": "pipeline.report",
    "sweep": "pipeline.sweep.run",
    "verify": "pipeline.verify",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `import gradpipe` loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gradpipe' has no attribute {name!r}")
    value = getattr(import_module(f"gradpipe.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
