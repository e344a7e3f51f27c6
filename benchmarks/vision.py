"""Top-1 accuracy of a pruned image classifier, by method and sparsity: Table 7 of GBLM-Pruner.

    python scripts/train_tiny_vit.py shapes
    python benchmarks/vision.py shapes/model shapes/calibration shapes/heldout

One store, collected once; one row for each method, one column for each sparsity. The paper's own
model, `google/vit-base-patch16-224` on ImageNet-1k, goes the same way.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from benchmarks.random_llama import heading, table
from gradpipe import CollectConfig, DataConfig, EvalConfig, PruneConfig, classify, collect, prune

SPARSITIES: Final = (0.4, 0.5, 0.6, 0.7, 0.8)
STATISTICS: Final = ("grad_l1", "grad_l2", "act_l2", "hessian", "grad_cov")
ROWS: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("magnitude, layer", {"method": "magnitude", "group": "layer"}),
    ("magnitude", {"method": "magnitude"}),
    ("wanda", {"method": "wanda"}),
    ("gradient l1", {"method": "gradient"}),
    ("gradient l2", {"method": "gradient", "grad_norm": "l2"}),
    ("gblm l1", {"method": "gblm"}),
    ("gblm l2", {"method": "gblm", "grad_norm": "l2"}),
    ("sparsegpt", {"method": "sparsegpt"}),
    ("--recipe best", {"recipe": "best"}),
)


def main(
    model: Annotated[str, typer.Argument(help="Directory or Hub id.")],
    calibration: Annotated[str, typer.Argument(help="Images to calibrate on.")],
    heldout: Annotated[str, typer.Argument(help="Images to evaluate on.")],
    num_samples: int = 128,
    batch_size: int = 50,
) -> None:
    """Print one table of top-1 accuracies, in per cent."""
    print(heading("Top-1 of pruned image classifiers"))
    evaluation = EvalConfig(model=model, data=DataConfig(name=heldout), batch_size=batch_size)
    dense = classify(evaluation)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        config = CollectConfig(
            model=model,
            store=store,
            data=DataConfig(name=calibration),
            num_samples=num_samples,
            batch_size=batch_size,
            statistics=STATISTICS,
        )
        collect(config)
        for name, options in ROWS:
            out = Path(folder) / "out"
            target = PruneConfig(
                model=model,
                store=str(store),
                out=out,
                sparsities=SPARSITIES,
                overwrite=True,
                **options,
            )
            pruned = [replace(evaluation, model=str(result.folder)) for result in prune(target)]
            accuracies = [classify(one).top1 for one in pruned]
            lines.append([name, *(f"{100 * x:.2f}" for x in (dense.top1, *accuracies))])
            print(*lines[-1], flush=True)
    print(f"\n{model}: {dense.num_images} held-out images, {num_samples} to calibrate.\n")
    print(table(["method", "0 %", *(f"{round(100 * x)} %" for x in SPARSITIES)], lines))


if __name__ == "__main__":
    typer.run(main)
