"""Where a store or a pruned checkpoint may be written: never over what is not gradpipe's own."""

import json
import os
import re
from pathlib import Path

from gradpipe.errors import InputError
from gradpipe.store.folder import is_complete, is_free, links_in

_MAX_NAME_BYTES = 200  # of the 255 that file systems have: locks and staging folders add theirs
REPORT = "pruning.json"  # what every pruned checkpoint holds


def check_store(folder: Path, sources: tuple[Path, ...]) -> None:
    """Raises InputError unless `folder` is free, or a store, and holds no source."""
    check_local("store", folder)
    if folder.is_symlink() and not folder.exists():
        raise InputError(f"store {folder} is a link to nothing: remove it, or give another name")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"store {folder} is a file, expected a folder to create")
    for source in sources:
        if folder.exists() and source.exists() and holds(folder, source):
            raise InputError(f"store {folder} holds {source}, which is read: give another name")
    if links := links_in(folder):
        raise InputError(
            f"store {folder}: {links[0]} in it is a link, and a store is no more than its own "
            "folder: move there what it leads to, or give another name"
        )
    if not is_free(folder) and not is_complete(folder):
        raise InputError(f"store {folder} holds files of another kind: give another name")


def check_out(out: Path, *, overwrite: bool, sources: tuple[Path, ...]) -> None:
    """Raises InputError if `out` holds something and `overwrite` is not given, or is no place."""
    check_local("OUT", out)
    check_apart(out, sources)
    if is_mount(out):
        raise InputError(
            f"OUT {out} is a mount point, which cannot be replaced by a finished checkpoint: give "
            f"a folder in it, such as {out / 'pruned'}"
        )
    if out.exists() and not overwrite and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"OUT {out} exists: give another name or --overwrite")
    if out.exists() and not out.is_dir():
        raise InputError(f"OUT {out} is a file, expected a folder to create or replace")
    if out.exists() and not (_has_report(out) or all(map(_has_report, out.iterdir()))):
        raise InputError(f"OUT {out} holds files that no pruning wrote: give another name")


def check_apart(out: Path, sources: tuple[Path, ...]) -> None:
    """Raises InputError if `out` holds what is read, or lies in it."""
    for source in sources:
        if holds(out, source) or holds(source, out):
            raise InputError(
                f"OUT {out} and {source}, which is read, are in one another: give another OUT"
            )


def _has_report(folder: Path) -> bool:
    try:
        report = json.loads((folder / REPORT).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(report, dict) and {"gradpipe", "layers", "command"} <= report.keys()


def check_local(what: str, path: Path) -> None:
    """Refuse a URL where something local is to be created, `~`, and a folder inside a file."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):  # a Path has turned :// into :/
        raise InputError(f"{what} {path} is a URL, expected a local folder: copy it to a URL after")
    if path.parts[:1] and path.parts[0].startswith("~"):  # of --scratch=~/x, no shell does
        raise InputError(
            f"{what} {path}: only a shell knows ~, at the start of a word: give the whole "
            f"path, or ./{path}"
        )
    if (length := len(os.fsencode(path.name))) > _MAX_NAME_BYTES:
        raise InputError(
            f"{what} {path.name[:20]}…: a name of {length} bytes, expected at most "
            f"{_MAX_NAME_BYTES}: give a shorter one"
        )
    for parent in path.absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise InputError(f"{what} {path}: {parent} is a file, expected a folder: give another")


def check_scratch(folder: Path, flag: str = "--scratch") -> None:
    """Raises InputError unless `folder` is one, or can be created."""
    check_local(flag, folder)
    if (folder.exists() and not folder.is_dir()) or not is_writable(folder):
        raise InputError(f"{flag} {folder}: expected a folder that can be created or written to")


def is_writable(path: Path) -> bool:
    """Whether `path`, or the nearest folder above it that exists, lets this user write."""
    nearest = next(x for x in (path, *path.absolute().parents) if x.exists())
    return os.access(nearest, os.W_OK)


def is_mount(path: Path) -> bool:
    """Whether a file system, or a folder of one, is mounted on `path`, links followed."""
    folder = path.resolve()
    mounts = Path("/proc/self/mountinfo")  # Linux; `os.path.ismount` does not see bound folders
    if not mounts.exists():
        return folder.is_mount()
    places = (line.split(b" ")[4] for line in mounts.read_bytes().splitlines())
    name = re.sub(rb"[ \t\n\\]", lambda x: b"\\%03o" % ord(x[0]), os.fsencode(folder))
    return name in places


def holds(outer: Path, inner: Path) -> bool:
    """Whether `inner` is `outer`, or lies in it, links followed."""
    return inner.resolve().is_relative_to(outer.resolve())
