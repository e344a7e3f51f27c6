"""What a pruning will do, decided before anything is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.prune.allocation import Allocation, Budgets
from gradpipe.stages.prune.layer import Procedure
from gradpipe.stages.prune.target import Budget, Target
from gradpipe.store.reader import GradientStore
from gradpipe.store.schema import LayerSpec

Layers = dict[str, LayerSpec]  # by weight key


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneJob:
    """What a run works on, once every check has passed."""

    checkpoint: Checkpoint
    store: GradientStore
    layers: dict[str, LayerSpec]  # by weight key
    procedure: Procedure
    targets: tuple[Target, ...]
    allocation: Allocation
    allow_mismatch: bool
    device: torch.device
    unseen: frozenset[str] = frozenset()  # weight keys: experts that no calibration token reached
    budgets: list[Budgets] = field(default_factory=list)  # in the targets' order, once allocated

    def budget(self, target: Target, key: str) -> Budget:
        """How much of a layer goes for a target."""
        return self.budgets[self.targets.index(target)][key]

    def procedure_of(self, key: str) -> Procedure:
        """How a layer is pruned."""
        return self.procedure.for_unseen() if key in self.unseen else self.procedure

    def folder(self, root: Path, target: Target) -> Path:
        """Where a target goes below the output folder: one needs no folder of its own."""
        return root if len(self.targets) == 1 else root / target.label
