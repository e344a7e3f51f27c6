"""Copy a store between folders, buckets and the Hub; killed, the same command goes on."""

from pathlib import Path

from rich.console import Console

from gradpipe.errors import InputError
from gradpipe.pipeline.places import check_local, holds
from gradpipe.pipeline.progress import QUIET, progress_bar
from gradpipe.pipeline.reports.store_card import store_card
from gradpipe.pipeline.stores.config import CopyConfig
from gradpipe.store.destination import (
    ROOT_KEY,
    BucketDestination,
    Destination,
    FolderDestination,
)
from gradpipe.store.folder import LOCK_NAME, PARTIAL
from gradpipe.store.objects import COMMIT_KEY, COPY_KEY
from gradpipe.store.reader import GradientStore
from gradpipe.store.urls import is_local

_OTHERS = {"README.md", LOCK_NAME, ".gitattributes", ".gitignore"}  # what may lie there, too


def copy(config: CopyConfig, console: Console = QUIET) -> GradientStore:
    """Copy every object, each verified on arrival, and the commit record last; opens the copy.

    A finished copy in a folder is read, and what is damaged in it is copied again.

    Raises InputError if something else is there, StoreError if the source is damaged,
    GradpipeError if an object cannot be written: the same call then goes on.
    """
    source = GradientStore.open(config.source)
    destination = _destination(config, source)
    if not _is_there(destination, source) or PARTIAL in destination.names():
        with destination.exclusive():
            if not _is_there(destination, source):  # another may have copied it meanwhile
                _copy(source, destination, console)
            destination.tidy()
    return GradientStore.open(config.destination)


def _copy(source: GradientStore, destination: Destination, console: Console) -> None:
    record = source.objects.record
    keys = sorted(record.objects.keys() - {ROOT_KEY})
    if destination.read(COPY_KEY) is None:
        destination.begin(record.to_bytes())
    with progress_bar(console, "copying", len(keys) + 1, "objects") as advance:
        destination.fill(source.objects, keys, advance)
        destination.fill(source.objects, [ROOT_KEY], advance)
    destination.finish(record, store_card(source))


def _destination(config: CopyConfig, source: GradientStore) -> Destination:
    """Where the copy goes; InputError for what can be no such place."""
    if config.destination.startswith("hf://"):
        from gradpipe.pipeline.stores.hub import HubDestination  # noqa: PLC0415 (takes a second)

        return HubDestination(config.destination, private=config.private)
    if config.private:
        raise InputError("--private: DST is not on the Hub: leave it out")
    if not is_local(config.destination):
        return BucketDestination(config.destination)
    destination = FolderDestination(config.destination)
    _check_folder(destination.folder, source)
    return destination


def _check_folder(folder: Path, source: GradientStore) -> None:
    check_local("DST", folder)
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise InputError(f"DST {folder} is a file, expected a folder to create")
    local = source.local_folder
    if local is not None and (holds(folder, local) or holds(local, folder)):
        raise InputError(f"DST {folder} and the store {local} are in one another: give another DST")


def _is_there(destination: Destination, source: GradientStore) -> bool:
    """Whether the copy is complete and sound; InputError if something else lies in its place."""
    record, names = source.objects.record.to_bytes(), destination.names()
    found = destination.read(COMMIT_KEY) if COMMIT_KEY in names else None
    if found is not None and found != record:
        raise InputError(f"{destination.url} holds another store: give another name")
    if found is not None:
        return destination.is_sound(source.objects.record)
    begun = destination.read(COPY_KEY) if names else None
    if begun is None and (odd := sorted(names - _OTHERS)):
        raise InputError(f"{destination.url} holds other files ({odd[0]:.80}): give another name")
    if begun not in {None, record}:
        raise InputError(
            f"{destination.url} holds a part of another store's copy: finish that one, or remove it"
        )
    return False
