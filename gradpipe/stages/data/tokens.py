"""Text that is tokens already: windows from a `.npy` file, taken as they are."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gradpipe.errors import InputError, one_line
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.data.config import TOKENS
from gradpipe.stages.data.samples import Samples
from gradpipe.stages.model.load import sequence_length

_LEAST_TOKENS = 2  # of a window


def is_tokens(name: str) -> bool:
    """True if a dataset's name is that of a file of tokens."""
    return name.endswith(TOKENS) and Path(name).is_file()


def window_length(name: str, asked: int | None, checkpoint: Checkpoint) -> int:
    """Tokens of a window of a dataset: `asked`, or the length of a file's own rows, or 2048.

    Raises InputError as `sequence_length` does.
    """
    ids = _load(name) if is_tokens(name) else None
    own = ids.shape[1] if ids is not None and ids.ndim == 2 else None
    return sequence_length(asked or own, checkpoint)


def token_windows(name: str, seq_len: int, most: int | None) -> npt.NDArray[np.int64]:
    """The first windows of a file, (windows, seq_len): its rows, or its one row cut up.

    Raises InputError if it holds no non-negative integers, or too few of them.
    """
    ids = _load(name)
    if ids.ndim == 1:
        count = ids.size // seq_len
        if count == 0:
            raise InputError(
                f"dataset {name} is too short: {ids.size} tokens, --seq-len is {seq_len}: give a "
                "longer file or a smaller --seq-len"
            )
        ids = ids[: count * seq_len].reshape(count, seq_len)
    if ids.shape[1] != seq_len:
        raise InputError(
            f"dataset {name} holds windows of {ids.shape[1]} tokens, --seq-len is {seq_len}: give "
            f"--seq-len {ids.shape[1]}"
        )
    return ids[:most].astype(np.int64)


def token_samples(name: str, num_samples: int, seq_len: int) -> Samples:
    """Calibration samples from a file; InputError if it has fewer."""
    windows = token_windows(name, seq_len, num_samples)
    if len(windows) < num_samples:
        raise InputError(
            f"dataset {name} has {len(windows)} windows of {seq_len} tokens, "
            f"--num-samples is {num_samples}: ask for fewer"
        )
    starts = np.arange(num_samples, dtype=np.int64) * seq_len
    return Samples.of(
        {
            "input_ids": windows.astype(np.int32),
            "sources": np.stack([np.full(num_samples, -1, dtype=np.int64), starts], axis=1),
        },
        dataset=name,
        sampling="tokens",
        seq_len=seq_len,
    )


def _load(name: str) -> npt.NDArray[np.integer[Any]]:
    """The file's integers, memory-mapped; nothing in it is run."""
    try:
        ids = np.lib.format.open_memmap(name, mode="r")  # `load` takes archives too
    except (OSError, ValueError) as error:
        raise InputError(f"dataset {name}: not a .npy file of tokens: {one_line(error)}") from error
    is_sound = ids.dtype.kind in "iu" and ids.ndim in {1, 2} and ids.size > 0
    if is_sound and ids.ndim == 2 and ids.shape[1] < _LEAST_TOKENS:
        raise InputError(
            f"dataset {name} holds windows of {ids.shape[1]} token, expected at least "
            f"{_LEAST_TOKENS}: the loss is of the next one"
        )
    if not is_sound or int(ids.min()) < 0 or int(ids.max()) >= 2**31:
        raise InputError(
            f"dataset {name}: expected token ids, non-negative integers in one or two dimensions, "
            f"got {ids.dtype} {ids.shape}"
        )
    return ids
