"""The states of a store's folder: free, begun, complete; and the samples that are fixed in it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from gradpipe.errors import StoreError, one_line
from gradpipe.store import arrays
from gradpipe.store.arrays import ATTRIBUTE, Nodes
from gradpipe.store.lock import locked
from gradpipe.store.objects import COMMIT_KEY, CommitRecord, ObjectReader, digest, remove_strays
from gradpipe.store.schema import StoreSpec

LOCK_NAME = ".lock"
PARTIAL = "partial"
BEGUN_KEY = f"{PARTIAL}/calibration.json"
_OWN = ("calibration", "layers", PARTIAL, COMMIT_KEY, "zarr.json")  # all that a store is made of


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The samples of a store."""

    arrays: dict[str, npt.NDArray[Any]]  # as `SampleSpec.arrays` says

    @property
    def digest(self) -> str:
        """xxh3-128 of all that the model is given, in order."""
        given = [array.tobytes() for name, array in self.arrays.items() if name != "sources"]
        return digest(b"".join(given))


def links_in(folder: Path) -> list[str]:
    """What a store would be made of, and is a link: what it leads to is no part of a store."""
    return [name for name in _OWN if (folder / name).is_symlink()]


def is_complete(folder: Path) -> bool:
    """True if the folder has a store's commit record."""
    return (folder / COMMIT_KEY).is_file()


def is_begun(folder: Path) -> bool:
    """True if the folder holds an unfinished store whose samples are fixed."""
    return not is_complete(folder) and (folder / BEGUN_KEY).is_file()


def is_free(folder: Path) -> bool:
    """True if a store may be collected there: empty, begun, or left by a run that was killed."""
    if not folder.exists() or is_begun(folder):
        return True
    if {path.name for path in folder.iterdir()} <= {LOCK_NAME, ".zarr.json.tmp"}:
        return True
    if is_complete(folder) or not (folder / "zarr.json").is_file():
        return False
    try:
        document = arrays.parse_group((folder / "zarr.json").read_bytes())
        return ATTRIBUTE in document.get("attributes", {})
    except (StoreError, TypeError):
        return False


def read_begun(folder: Path) -> tuple[StoreSpec, Calibration]:
    """Spec and samples of an unfinished store; StoreError if they are damaged."""
    try:
        document = arrays.parse_group((folder / "zarr.json").read_bytes())
        spec = StoreSpec.from_json(document["attributes"][ATTRIBUTE])
        return spec, read_calibration(Nodes(ObjectReader(str(folder), record_key=BEGUN_KEY)), spec)
    except (StoreError, FileNotFoundError, KeyError, TypeError) as error:
        raise StoreError(
            f"store {folder} was begun, but its samples or its zarr.json are damaged "
            f"({one_line(error)}): remove it, or overwrite it, to start anew"
        ) from error


def read_calibration(nodes: Nodes, spec: StoreSpec) -> Calibration:
    """The samples in a store; StoreError unless they are those that its spec names."""
    types = spec.samples.arrays()
    calibration = Calibration(
        arrays={name: nodes.array(f"calibration/{name}", *types[name]) for name in types}
    )
    if calibration.digest != spec.samples.digest:
        names = ", ".join(name for name in types if name != "sources")
        raise StoreError(
            f"store {nodes.objects.url}: calibration/{names} are not the spec's samples"
        )
    if "labels" in calibration.arrays and int(calibration.arrays["labels"].min()) < 0:
        raise StoreError(f"store {nodes.objects.url}: calibration/labels are negative")
    return calibration


def clear(folder: Path) -> None:
    """Remove the store in `folder`, whose lock the caller holds, to begin another in its place.

    Raises InputError if a process is still collecting one of its shards.
    """
    for lock in (folder / PARTIAL).glob("*.lock"):
        with locked(lock, of=folder, wait=False):
            pass  # nobody holds it, and nobody can take it without the store's lock
    for key in (COMMIT_KEY, BEGUN_KEY):  # first: without the rest it is neither
        (folder / key).unlink(missing_ok=True)
    remove_strays(folder, _OWN, keep=())


def tidy(folder: Path) -> None:
    """Remove what a complete store's commit record does not name; files of others stay."""
    record = CommitRecord.from_bytes((folder / COMMIT_KEY).read_bytes())
    remove_strays(folder, (*_OWN, LOCK_NAME), keep={*record.objects, COMMIT_KEY})
