"""gradpipe: one-shot pruning of large language models from gradients.

Stage one, `collect`, streams calibration samples once through a model and writes a gradient
store. Stage two, `prune`, sparsifies the checkpoint from the store, at as many sparsities as
asked, and never runs the model.
"""

from gradpipe.errors import GradpipeError, InputError, Interrupted, StoreError
from gradpipe.pipeline.collect import CollectConfig, collect, collect_shard, plan
from gradpipe.pipeline.demo import DemoResult, demo
from gradpipe.pipeline.evaluate import Accuracy, EvalConfig, Metrics, classify, evaluate
from gradpipe.pipeline.import_gblm import ImportConfig, import_gblm
from gradpipe.pipeline.merge import merge
from gradpipe.pipeline.output import LayerResult, PruneResult
from gradpipe.pipeline.prune import prune
from gradpipe.pipeline.prune_config import PruneConfig
from gradpipe.stages.samples import DataConfig
from gradpipe.store.gradients import GradientStore
from gradpipe.store.partial import Shard

open_store = GradientStore.open

__all__ = [
    "Accuracy",
    "CollectConfig",
    "DataConfig",
    "DemoResult",
    "EvalConfig",
    "GradientStore",
    "GradpipeError",
    "ImportConfig",
    "InputError",
    "Interrupted",
    "LayerResult",
    "Metrics",
    "PruneConfig",
    "PruneResult",
    "Shard",
    "StoreError",
    "classify",
    "collect",
    "collect_shard",
    "demo",
    "evaluate",
    "import_gblm",
    "merge",
    "open_store",
    "plan",
    "prune",
]
