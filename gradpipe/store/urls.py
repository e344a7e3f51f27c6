"""What the name of a store means: a path of this machine, or a URL that fsspec knows.

To fsspec `a::b` is a chain of file systems, and `data:x` is data: both may be folders' names. Here
what has no `://` is a path.
"""

from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from gradpipe.errors import InputError


def located(url: str, options: dict[str, Any] | None = None) -> tuple[Any, str]:
    """The file system behind a URL, and the place in it; InputError for no URL at all."""
    if not url:
        raise InputError("store '': expected a path or a URL")
    if "://" in url:
        files, root = fsspec.core.url_to_fs(url, **(options or {}))
    else:
        files = LocalFileSystem(**(options or {}))
        root = files._strip_protocol(url)  # noqa: SLF001 (made absolute)
    return files, root.rstrip("/")


def local_place(files: Any, root: str) -> Path | None:
    """The folder that is behind a URL, also behind `file://`; None if it is remote."""
    return Path(root) if isinstance(files, LocalFileSystem) else None


def is_local(url: str) -> bool:
    """Whether a URL, or a path, names a folder of this machine."""
    return "://" not in url or fsspec.core.split_protocol(url)[0] in LocalFileSystem.protocol
