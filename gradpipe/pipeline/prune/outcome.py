"""What a pruning did: weights read back from the written files, counted, and reported."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from gradpipe.errors import GradpipeError
from gradpipe.pipeline.options import changed_options, recorded_command
from gradpipe.pipeline.prune.config import PruneConfig
from gradpipe.pipeline.prune.files import Written
from gradpipe.pipeline.prune.plan import PruneJob
from gradpipe.pipeline.reports.checkpoint import write_report
from gradpipe.pipeline.reports.results import LayerResult, PruneResult
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.checkpoint.tensors import as_tensor, count_zeros
from gradpipe.stages.prune.methods import METHODS
from gradpipe.stages.prune.target import Target, pattern_name
from gradpipe.store.objects import digest


def missed_target(job: PruneJob, target: Target) -> list[str]:
    """A line if mixed patterns do not meet their target: blocks of several sizes may not add up."""
    if target.pattern is None or not job.budgets:
        return []
    total = sum(layer.num_weights for layer in job.layers.values())
    pruned = sum(job.budget(target, key).sparsity * x.num_weights for key, x in job.layers.items())
    if pruned == target.budget.sparsity * total:
        return []
    note = (
        f"{target.pattern} mixed by block prunes {float(pruned / total):.2%} of the weights, not "
        f"{float(target.budget.sparsity):.2%}: the blocks' sizes do not add up to it"
    )
    return [note]


def identity(config: PruneConfig, job: PruneJob, target: Target) -> dict[str, object]:
    """What all shards of one command agree on, as `pruning.json` has it."""
    report = _report(config, job, target, Written())
    names = ("model", "revision", "store", "command")
    return {"gradpipe": version("gradpipe"), **{name: report[name] for name in names}}


def finish(
    config: PruneConfig, job: PruneJob, staging: Path, written: Written
) -> tuple[PruneResult, ...]:
    """Copy what is not weights, read the weights back, and write the reports."""
    results = []
    for target in job.targets:
        folder = job.folder(staging, target)
        for path in job.checkpoint.companions():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(job.checkpoint.folder / path, folder / path)
        result = PruneResult(
            folder=job.folder(config.out, target),
            label=target.label,
            requested=float(target.budget.sparsity),
            layers=tuple(_read_back(job, target, folder, written)),
        )
        write_report(folder, _report(config, job, target, written), result)
        results.append(result)
    return tuple(results)


def _read_back(
    job: PruneJob, target: Target, folder: Path, written: Written
) -> Iterator[LayerResult]:
    """Count the zeros that are really in the written file."""
    checkpoint = Checkpoint.open(str(folder))
    for key, layer in sorted(job.layers.items()):
        data = checkpoint.read_bytes(key)
        if digest(data) != written.digests[target.label][key]:
            raise GradpipeError(
                f"layer {layer.name} reads back from {folder} otherwise than it was written"
            )
        yield LayerResult(
            name=layer.name,
            requested=float(job.budget(target, key).sparsity),
            pattern=pattern_name(job.budget(target, key)),
            zeros=count_zeros(as_tensor(data, checkpoint.tensors[key])),
            size=layer.num_weights,
        )


def _report(
    config: PruneConfig, job: PruneJob, target: Target, written: Written
) -> dict[str, object]:
    """What was done, for `pruning.json`: the same whether or not other targets ran beside it."""
    leave_out = {"model", "store", "out", "sparsities", "patterns", "overwrite", "device", "shard"}
    pattern = pattern_name(target.budget)
    goal = {"pattern": pattern} if pattern else {"sparsity": target.sparsity}
    options = changed_options(config, leave_out) | goal
    if config.score is None:
        options["method"] = config.method
    score = job.procedure.score
    return {
        "model": job.checkpoint.label,
        "revision": job.checkpoint.revision,
        "store": job.store.digest,
        "method": config.method if config.score is None else config.score,
        "score": None if score is None else score.expression.text,
        "update": config.update,
        "curvature": config.curvature,
        "allocation": config.allocation,
        "statistics": list(config.statistics),
        "alpha": config.alpha,
        "grad_norm": config.grad_norm,
        "group": config.group or METHODS[config.method].group,
        "pattern": pattern or "unstructured",
        "mismatched_layers": sorted(written.mismatched),
        "unseen_layers": sorted(job.layers[key].name for key in job.unseen),
        "notes": [*missed_target(job, target), *sorted(written.notes)],
        "command": recorded_command("prune", (job.checkpoint.label, "STORE", "OUT"), options),
    }
