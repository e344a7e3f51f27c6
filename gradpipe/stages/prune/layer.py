"""One layer of stage two: decode its statistics, score it once, mask it for every target."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradpipe.errors import GradpipeError
from gradpipe.stages.prune.alps import Eigenbasis, alps_mask
from gradpipe.stages.prune.curvature import Curvature
from gradpipe.stages.prune.decode import decode_norms
from gradpipe.stages.prune.least_squares import least_squares
from gradpipe.stages.prune.mask import Group
from gradpipe.stages.prune.methods import Norms, Score, find_score
from gradpipe.stages.prune.sparsegpt import obs_update, sparsegpt
from gradpipe.stages.prune.target import Budget
from gradpipe.store.codec import Encoded

UPDATES = ("none", "obs", "lsq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Procedure:
    """How a layer's weights are picked, and what becomes of those that stay."""

    method: str
    score: Score | None  # None for sparsegpt and alps, which pick by second moments
    update: str  # of a scored mask: none, obs or lsq
    curvature: str  # what alps and lsq minimise: input or kfac
    group: Group

    @property
    def statistics(self) -> tuple[str, ...]:
        """What is read of each layer."""
        names = () if self.score is None else self.score.statistics
        return (*names, *self._second_moments)

    def for_unseen(self) -> Procedure:
        """The same for a layer that no calibration token reached: by magnitude."""
        score = find_score("magnitude", grad_norm="l1", alpha=0.0)
        return replace(self, method="magnitude", score=score, update="none")

    @property
    def _second_moments(self) -> tuple[str, ...]:
        if self.score is not None and self.update == "none":
            return ()
        both = self.curvature == "kfac" and (self.method == "alps" or self.update == "lsq")
        return ("hessian", "grad_cov") if both else ("hessian",)

    def curvature_of(self, name: str, norms: Norms) -> Curvature | None:
        """A layer's second moments, damped; None if they are not needed."""
        if not self._second_moments:
            return None
        values = norms.values
        return Curvature.of(name, values["hessian"], values.get("grad_cov"))


def norms_on(
    encoded: Mapping[str, Encoded], statistics: Iterable[str], device: torch.device
) -> Norms:
    """Move codes to the device, and decode there what the method needs of them."""
    return Norms(
        values={name: decode_norms(encoded, name, device) for name in statistics},
        num_samples={name: item.spec.num_samples for name, item in encoded.items()},
    )


def score_layer(name: str, weight_OI: Tensor, norms: Norms, score: Score) -> Tensor:
    """A layer's scores, (O, I); GradpipeError if one is not a number."""
    score_OI = score.of(weight_OI, norms)
    if not _is_finite(score_OI):
        raise GradpipeError(
            f"layer {name}: a score {score.expression.text} is NaN or infinite, "
            "as its weights or its statistics are, or the formula makes it"
        )
    return score_OI


def prune_layer(
    name: str,
    weight: Tensor,
    norms: Norms,
    procedure: Procedure,
    budgets: Sequence[Budget],
    notes: list[str],
    *,
    transposed: bool,
) -> Iterator[Tensor]:
    """The pruned weight for each budget in turn, on the CPU, as the checkpoint keeps it.

    `notes` takes messages for the user, such as that damping was raised. Raises GradpipeError if a
    score is not a number, or if a second moment is singular whatever the damping.
    """
    if not _is_finite(weight):
        raise GradpipeError(f"layer {name}: its weights hold NaN or infinite values")
    weight_OI = weight.T if transposed else weight
    curvature = procedure.curvature_of(name, norms)
    notes.extend(() if curvature is None else curvature.notes)
    prune_to = _pruner(name, weight_OI, norms, procedure, curvature)
    del norms  # as large as the layer, and all in the score by now
    for budget in budgets:
        updated_OI, mask_OI = prune_to(budget)
        pruned_OI = updated_OI.to(weight_OI.dtype).masked_fill(~mask_OI, 0.0)
        if not _is_finite(pruned_OI):
            raise GradpipeError(
                f"layer {name}: an updated weight is beyond {weight_OI.dtype}: choose one that "
                "leaves weights as they are"
            )
        yield (pruned_OI.T if transposed else pruned_OI).contiguous().cpu()


def _is_finite(matrix: Tensor) -> bool:
    """True if no value is NaN or infinite, found without another matrix of the same size."""
    return all(math.isfinite(x) for x in torch.stack(torch.aminmax(matrix)).tolist())


_Pruner = Callable[[Budget], tuple[Tensor, Tensor]]  # budget -> weights, mask, both (O, I)


def _pruner(
    name: str, weight_OI: Tensor, norms: Norms, procedure: Procedure, curvature: Curvature | None
) -> _Pruner:
    """What does not depend on the budget, done once."""
    group = procedure.group
    if procedure.score is not None:
        score_OI = score_layer(name, weight_OI, norms, procedure.score)
        update = _updater(weight_OI, procedure, curvature)

        def scored(budget: Budget) -> tuple[Tensor, Tensor]:
            mask_OI = budget.mask(score_OI, group)
            return update(mask_OI), mask_OI

        return scored
    assert curvature is not None
    moments = curvature
    free = moments.free  # these go first
    if procedure.method == "sparsegpt":
        factor_II = moments.inverse_factor()
        costly_OI = weight_OI.masked_fill(free, 0.0)

        def swept(budget: Budget) -> tuple[Tensor, Tensor]:
            updated_OI, mask_OI = sparsegpt(costly_OI, factor_II, budget.sparsity, budget.pattern)
            return updated_OI.where(~free, weight_OI.to(updated_OI.dtype)), mask_OI

        return swept
    basis = Eigenbasis.of(moments)

    def alps(budget: Budget) -> tuple[Tensor, Tensor]:
        def select(score_OI: Tensor) -> Tensor:
            return budget.mask(score_OI.masked_fill(free, 0.0), group)

        mask_OI = alps_mask(weight_OI, basis, select)
        return least_squares(weight_OI, mask_OI, moments), mask_OI

    return alps


def _updater(
    weight_OI: Tensor, procedure: Procedure, curvature: Curvature | None
) -> Callable[[Tensor], Tensor]:
    """From a mask to the weights that go with it."""
    if curvature is None:
        return lambda _: weight_OI
    if procedure.update == "obs":
        factor_II = curvature.inverse_factor()
        return lambda mask_OI: obs_update(weight_OI, mask_OI, factor_II)
    return lambda mask_OI: least_squares(weight_OI, mask_OI, curvature)
