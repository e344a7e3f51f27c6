from gradpipe.errors import GradpipeError, InputError, Interrupted, StoreError
from gradpipe.pipeline.collect.config import CollectConfig, ImportConfig
from gradpipe.pipeline.collect.import_gblm import import_gblm
from gradpipe.pipeline.collect.merge import merge
from gradpipe.pipeline.collect.run import collect, collect_shard, plan
from gradpipe.pipeline.demo import demo
from gradpipe.pipeline.evaluate import classify, evaluate
from gradpipe.pipeline.evaluate_config import EvalConfig
from gradpipe.pipeline.masks import apply_masks, export_masks
from gradpipe.pipeline.prune.config import PruneConfig
from gradpipe.pipeline.prune.run import prune
from gradpipe.pipeline.report import report
from gradpipe.pipeline.report_config import ReportConfig
from gradpipe.pipeline.reports.points import PointResult
from gradpipe.pipeline.reports.results import (
    Accuracy,
    DemoResult,
    LayerResult,
    Metrics,
    PruneResult,
)
from gradpipe.pipeline.sweep.config import SweepConfig
from gradpipe.pipeline.sweep.run import sweep
from gradpipe.pipeline.verify import Verified, verify
from gradpipe.stages.data.config import DataConfig
from gradpipe.store.reader import GradientStore, open_store
from gradpipe.store.shard import Shard

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
    "PointResult",
    "PruneConfig",
    "PruneResult",
    "ReportConfig",
    "Shard",
    "StoreError",
    "SweepConfig",
    "Verified",
    "apply_masks",
    "classify",
    "collect",
    "collect_shard",
    "demo",
    "evaluate",
    "export_masks",
    "import_gblm",
    "merge",
    "open_store",
    "plan",
    "prune",
    "report",
    "sweep",
    "verify",
]
