"""Calibration samples once they are drawn: what the model is given, and what a store says of it."""

from typing import Any, NamedTuple, Self

import numpy.typing as npt

from gradpipe.store.folder import Calibration
from gradpipe.store.schema import SampleSpec


class Samples(NamedTuple):
    """What every way to draw samples gives."""

    spec: SampleSpec
    calibration: Calibration

    @classmethod
    def of(
        cls,
        arrays: dict[str, npt.NDArray[Any]],
        *,
        dataset: str,
        sampling: str,
        seq_len: int,
        seed: int = 0,
        revision: str | None = None,
        image_shape: tuple[int, ...] | None = None,
    ) -> Self:
        """Samples in `arrays`, named and shaped as `SampleSpec.arrays` says."""
        calibration = Calibration(arrays=arrays)
        spec = SampleSpec(
            dataset=dataset,
            revision=revision,
            sampling=sampling,
            seed=seed,
            num_samples=len(arrays["sources"]),
            seq_len=seq_len,
            digest=calibration.digest,
            image_shape=image_shape,
        )
        return cls(spec, calibration)
