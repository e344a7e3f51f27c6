"""What the hub of `tests.support.hub` takes in: repositories, large files, commits.

Source: the requests of huggingface_hub 2.4 (`_commit_api.py`, `lfs.py`). What is no text of
small size is a large file there, as on the real Hub, and sent by git LFS's batch API.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.support.hub import Hub

_SMALL = 1 << 20


def answer(hub: Hub, steps: list[str], body: bytes) -> object | None:
    """The answer to a POST of these steps below the endpoint; None if it uploads nothing."""
    if steps == ["api", "repos", "create"]:
        return _create(hub, json.loads(body))
    if steps == ["api", "validate-yaml"]:
        return {"errors": [], "warnings": []}
    if steps[-4:] == ["info", "lfs", "objects", "batch"]:
        return {"objects": [_upload(hub, x) for x in json.loads(body)["objects"]]}
    if len(steps) > 4 and steps[4] == "preupload":
        hub.resolve("/".join(steps[1:4]), "main")
        return {"files": [_mode(x) for x in json.loads(body)["files"]]}
    if len(steps) > 4 and steps[4] == "commit":
        return _commit(hub, "/".join(steps[1:4]), body)
    return None


def keep(hub: Hub, sha256: str, data: bytes) -> None:
    """Take a large file in."""
    assert hashlib.sha256(data).hexdigest() == sha256
    hub.blobs[sha256] = data


def _create(hub: Hub, wanted: dict[str, Any]) -> object:
    repo = f"{wanted.get('type', 'model')}s/{wanted['organization']}/{wanted['name']}"
    hub.commit(repo, Path(tempfile.mkdtemp(dir=hub.uploads)))
    if wanted.get("visibility") == "private":
        hub.private.add(repo)
    return {"url": f"{hub.endpoint}/{repo}"}


def _mode(file: dict[str, Any]) -> object:
    sample = base64.b64decode(file["sample"])
    is_text = file["size"] < _SMALL and b"\0" not in sample and sample.isascii()
    mode = "regular" if is_text else "lfs"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


def _upload(hub: Hub, wanted: dict[str, Any]) -> object:
    href = f"{hub.endpoint}/blobs/{wanted['oid']}"
    actions = {} if wanted["oid"] in hub.blobs else {"actions": {"upload": {"href": href}}}
    return {**wanted, **actions}


def _commit(hub: Hub, repo: str, body: bytes) -> object:
    """The newest commit's files, changed."""
    folder = Path(tempfile.mkdtemp(dir=hub.uploads))
    shutil.copytree(hub.resolve(repo, "main")[1], folder, dirs_exist_ok=True)
    for line in body.splitlines():
        item = json.loads(line)
        path, value = folder / item["value"].get("path", ""), item["value"]
        if item["key"] == "deletedFile":
            path.unlink()
        elif item["key"] != "header":
            path.parent.mkdir(parents=True, exist_ok=True)
            is_large = item["key"] == "lfsFile"
            path.write_bytes(
                hub.blobs[value["oid"]] if is_large else base64.b64decode(value["content"])
            )
    commit = hub.commit(repo, folder)
    return {"commitUrl": f"{hub.endpoint}/{repo}/commit/{commit}", "commitOid": commit}
