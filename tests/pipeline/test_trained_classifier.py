"""The script that trains a small classifier, and what pruning it costs."""

import subprocess
import sys
from pathlib import Path

import pytest

from gradpipe import CollectConfig, DataConfig, EvalConfig, PruneConfig, classify, collect, prune

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_trained_model_loses_by_pruning(tmp_path: Path) -> None:
    """A short run of the script learns its shapes, and pruning nearly all of it forgets them."""
    script = [sys.executable, str(ROOT / "scripts" / "train_tiny_vit.py"), str(tmp_path / "vit")]
    size = "--hidden 32 --blocks 2 --steps 250 --num-calibration 40 --num-heldout 200"
    subprocess.run([*script, *size.split()], check=True, capture_output=True)
    model = str(tmp_path / "vit" / "model")
    images = DataConfig(name=str(tmp_path / "vit" / "heldout"))
    dense = classify(EvalConfig(model=model, data=images, batch_size=50))
    assert (dense.num_images, dense.dtype) == (200, "float32")
    assert dense.top1 > 0.2  # of ten classes
    data = DataConfig(name=str(tmp_path / "vit" / "calibration"))
    run = CollectConfig(model=model, store=tmp_path / "store", data=data, num_samples=40)
    collect(run)
    target = PruneConfig(
        model=model, store=str(run.store), out=tmp_path / "out", sparsities=(0.5, 0.95)
    )
    prune(target)
    top1 = [
        classify(EvalConfig(model=str(tmp_path / "out" / name), data=images, batch_size=50)).top1
        for name in ("s0.50", "s0.95")
    ]
    assert top1[1] < dense.top1 - 0.05
    assert top1[0] > top1[1]
