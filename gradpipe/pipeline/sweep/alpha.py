"""`--alpha auto`: the α of the least perplexity on calibration text that the store has not seen."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gradpipe.errors import InputError
from gradpipe.pipeline.sweep.config import SweepConfig
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.data.config import PRESETS, DataConfig
from gradpipe.stages.data.text import load_text
from gradpipe.stages.data.tokens import is_tokens, token_windows
from gradpipe.stages.data.windows import draw_samples
from gradpipe.stages.model.load import load_tokenizer
from gradpipe.store.reader import GradientStore

ALPHAS = (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)  # Table 6's, less those that change nothing
NUM_WINDOWS = 16


def heldout_windows(
    config: SweepConfig, stores: Sequence[GradientStore], checkpoint: Checkpoint
) -> tuple[npt.NDArray[np.int64], str]:
    """Windows of text that no store has seen, and the text's name.

    They are drawn as the first store's own were, by the next seed. InputError if that store does
    not say what text it is of, or if the text has no more.
    """
    store = stores[0]
    samples = store.spec.samples
    if samples.image_shape is not None or not samples.digest:
        raise InputError(
            f"--alpha auto: store {store.url} is not of text that is known: give numbers"
        )
    name = config.alpha_dataset or samples.dataset
    if config.alpha_dataset is None and name not in PRESETS:
        raise InputError(
            f"--alpha auto: store {store.url} was collected from {name}: say where that is by "
            "--alpha-dataset"
        )
    if is_tokens(name):
        windows = token_windows(name, samples.seq_len, None)
        drawn, sources = windows, np.array([(-1, i * samples.seq_len) for i in range(len(windows))])
    else:
        tokenizer = load_tokenizer(checkpoint)
        text = load_text(DataConfig(name=name), "calibration", tokenizer)
        more = draw_samples(
            name, text, tokenizer, 4 * NUM_WINDOWS, samples.seq_len, samples.seed + 1
        )
        drawn, sources = (more.calibration.arrays[x] for x in ("input_ids", "sources"))
    seen = np.concatenate([x.calibration().arrays["sources"] for x in stores])
    fresh = [x for x in range(len(drawn)) if not _overlaps(sources[x], seen, samples.seq_len)]
    if not fresh:
        raise InputError(
            f"--alpha auto: dataset {name} has no windows beside those that store {store.url} is "
            "of: give another --alpha-dataset"
        )
    windows = np.asarray(drawn[fresh[:NUM_WINDOWS]], dtype=np.int64)
    return windows, DataConfig(name=name).label


def _overlaps(source: Any, seen: npt.NDArray[np.int64], seq_len: int) -> bool:
    """Whether a window (document, first token) shares a token with any of those seen."""
    same = seen[:, 0] == source[0]
    return bool((same & (np.abs(seen[:, 1] - source[1]) < seq_len)).any())
