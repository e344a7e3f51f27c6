"""The model that gradpipe ships, and the text that goes with it.

`EMBEDDED_MODEL` is a checkpoint of a 1.26 M parameter Llama, trained on the source of CPython
3.11.7's standard library. Every Python carries such text, so calibration and evaluation need no
download: `stdlib_documents` reads it from the running interpreter and splits it as the training
did. A file is held out if and only if `embedded/heldout_modules.txt` names it; that list was made
by sorting the 612 paths, `random.Random(0).shuffle`, and taking the first 612 // 20.

On CPython 3.11.7 the documents of either split, joined with `DOCUMENT_SEPARATOR`, are the very
tokens of the model's training (2,810,296) and of its held-out text (141,907). On other versions
the text differs a little, the split doesn't: what the list names is never calibrated on.
"""

import os
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from gradpipe.errors import InputError
from gradpipe.stages.checkpoint.place import EMBEDDED_MODEL

_EMBEDDED: Final = EMBEDDED_MODEL.parent
_EXCLUDED_FOLDERS: Final = frozenset({"test", "tests", "idle_test", "encodings", "site-packages"})
_SHUFFLE_SEED: Final = 0
DOCUMENT_SEPARATOR: Final = "\n"
"""What stood between two files when the model was trained."""


def stdlib_documents(split: Literal["train", "heldout"]) -> list[tuple[str, str]]:
    """Return (posix path below the standard library, text) of each file in one split.

    The order is fixed: held-out files as the shipped list has them, training files sorted by path
    and then shuffled with seed 0. Files that aren't UTF-8 are skipped.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = _heldout_names(root) if split == "heldout" else _train_names(root)
    documents = [(name, text) for name in names if (text := _read_utf8(root / name)) is not None]
    if not documents:
        raise InputError(
            f"no {split} files of Python's standard library in {root}: expected its .py sources; "
            "use an ordinary Python install, or pass a text file or folder of your own"
        )
    return documents


def heldout_modules() -> tuple[str, ...]:
    """Return the shipped list: posix paths, relative to the standard library."""
    return tuple((_EMBEDDED / "heldout_modules.txt").read_text(encoding="utf-8").split())


def _heldout_names(root: Path) -> list[str]:
    present = frozenset(_source_names(root))
    return [name for name in heldout_modules() if name in present]


def _train_names(root: Path) -> list[str]:
    names = sorted(_source_names(root))
    random.Random(_SHUFFLE_SEED).shuffle(names)
    heldout = frozenset(heldout_modules())
    return [name for name in names if name not in heldout]


def _source_names(root: Path) -> Iterator[str]:
    """Yield the posix path of each .py file below root, without entering excluded folders."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _EXCLUDED_FOLDERS]
        for name in files:
            if name.endswith(".py"):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _read_utf8(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
