from .errors import GradpipeError, InputError, Interrupted, StoreError
from .pipeline.collect import CollectConfig, collect, collect_shard, plan
from .pipeline.demo import DemoResult, demo
from .pipeline.evaluate import Accuracy, EvalConfig, Metrics, classify, evaluate
from .pipeline.import_gblm import ImportConfig, import_gblm
from .pipeline.merge import merge
from .pipeline.output import LayerResult, PruneResult
from .pipeline.prune import prune
from .pipeline.prune_config import PruneConfig
from .stages.samples import DataConfig
from .store.gradients import GradientStore, open_store
from .store.partial import Shard

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
