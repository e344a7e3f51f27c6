"""A small Hugging Face Hub on this machine, and a process that talks to it.

What: the part of the Hub's HTTP API that `huggingface_hub` and `datasets` use to look up, list and
download repositories; repositories are folders, each a commit. Every request is remembered.
Why: what fetches from the Hub is tested with the real clients, unpatched, and without a network.
Source: the requests were read off the clients (huggingface_hub 2.4, datasets 5.2); the error codes
are those that `huggingface_hub.utils.hf_raise_for_status` looks for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support import hub_uploads
from tests.support.serving import Handler, serving

KINDS = ("models", "datasets")


class RefusedError(Exception):
    """The Hub's code for why: RepoNotFound, RevisionNotFound, EntryNotFound or GatedRepo."""


class Hub:
    """Repositories by kind and id: commits, oldest first, each the folder with its files."""

    def __init__(self) -> None:
        """No repository yet."""
        self.repos: dict[str, dict[str, Path]] = {}  # "datasets/allenai/c4" -> commit -> folder
        self.gated: set[str] = set()  # repositories whose terms nobody accepted
        self.private: set[str] = set()
        self.blobs: dict[str, bytes] = {}  # large files by their SHA-256
        self.uploads = Path()  # where what is uploaded lies
        self.refuses = ""  # a part of paths that are answered by 503
        self.requests: list[str] = []  # "GET /api/models/…", in the order they came
        self.endpoint = ""

    def commit(self, repo: str, folder: Path, commit: str | None = None) -> str:
        """Publish `folder` as the newest commit of `repo`, `models/…` or `datasets/…`."""
        commits = self.repos.setdefault(repo, {})
        name = commit or hashlib.sha1(f"{repo}{len(commits)}".encode()).hexdigest()  # noqa: S324 (as git names)
        commits[name] = folder
        return name

    def resolve(self, repo: str, revision: str) -> tuple[str, Path]:
        """The commit that a revision (a commit or `main`) means, and its folder."""
        if repo not in self.repos:
            raise RefusedError("RepoNotFound")
        if repo in self.gated:
            raise RefusedError("GatedRepo")
        commits = self.repos[repo]
        commit = [*commits][-1] if revision == "main" else revision
        if commit not in commits:
            raise RefusedError("RevisionNotFound")
        return commit, commits[commit]

    def downloads(self, repo: str) -> set[str]:
        """Names of the files of `repo` whose content was asked for."""
        paths = [line.removeprefix("GET /") for line in self.requests if line.startswith("GET /")]
        prefix = repo.removeprefix("models/") + "/resolve/"
        return {p.removeprefix(prefix).split("/", 1)[1] for p in paths if p.startswith(prefix)}


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A hub without repositories that answers on a free port of this machine."""
    hub = Hub()
    with tempfile.TemporaryDirectory() as uploads, serving(_Handler, hub=hub) as hub.endpoint:
        hub.uploads = Path(uploads)
        yield hub


@contextlib.contextmanager
def client(endpoint: str, cache: Path, *, offline: bool = False) -> Iterator[ProcessPoolExecutor]:
    """A process in which the Hub is at `endpoint`; its libraries read that when first imported."""
    environment = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",  # uploads go by git LFS, which this hub speaks
        "NO_PROXY": "127.0.0.1",
    }
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_stay_on_this_machine) as pool:
        with mock.patch.dict(os.environ, environment):
            pool.submit(os.getpid).result()  # the process starts, with this environment
        yield pool


def _stay_on_this_machine() -> None:
    """Let this process connect to 127.0.0.1 only."""

    def refuse(event: str, args: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo" and args[0] not in {None, "127.0.0.1"}:
            raise RuntimeError(f"a test tried to look up {args[0]}")

    sys.addaudithook(refuse)


class _Handler(Handler):
    hub: ClassVar[Hub]

    def answer(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {unquote(url.path)}")
        steps = [unquote(step) for step in url.path.strip("/").split("/")]
        try:
            if self.hub.refuses and self.hub.refuses in url.path:
                self._send(b"", 503, {})
            elif self.command == "PUT":
                hub_uploads.keep(self.hub, steps[-1], body)
                self._send(b"", 200, {})
            elif self.command == "POST" and (done := hub_uploads.answer(self.hub, steps, body)):
                self._send(json.dumps(done).encode(), 200, {"Content-Type": "application/json"})
            elif steps[0] == "api":
                self._api(steps[1:], parse_qs(url.query), parse_qs(body.decode(errors="replace")))
            else:
                self._file(steps)
        except RefusedError as error:
            status = 403 if str(error) == "GatedRepo" else 404
            self._send(b"", status, {"X-Error-Code": str(error)})

    def _file(self, steps: list[str]) -> None:
        """`[datasets/]owner/name/resolve/revision/path`."""
        steps = steps if steps[0] in KINDS else ["models", *steps]
        repo, revision, name = "/".join(steps[:3]), steps[4], "/".join(steps[5:])
        commit, folder = self.hub.resolve(repo, revision)
        headers = {"X-Repo-Commit": commit}
        if not (folder / name).is_file():
            self._send(b"", 404, headers | {"X-Error-Code": "EntryNotFound"})
            return
        data = (folder / name).read_bytes()
        self._send(data, 200, headers | {"ETag": f'"{_blob_id(folder / name)}"'})

    def _api(self, steps: list[str], query: dict[str, Any], form: dict[str, Any]) -> None:
        """`kind/owner/name[/(revision|tree|paths-info)/revision[/path]]`."""
        repo, verb = "/".join(steps[:3]), steps[3] if len(steps) > 3 else "revision"
        revision = steps[4] if len(steps) > 4 else "main"
        commit, folder = self.hub.resolve(repo, revision)
        entries = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*"))}
        if verb == "revision":
            siblings = [{"rfilename": name} for name, p in entries.items() if p.is_file()]
            document: Any = {"id": "/".join(steps[1:3]), "sha": commit, "siblings": siblings}
            document["private"] = repo in self.hub.private
        elif verb == "tree":
            top = folder / "/".join(steps[5:])
            recursive = query.get("recursive", ["false"])[0].lower() in {"1", "true"}
            inside = {n: p for n, p in entries.items() if top in p.parents}
            if not inside and top != folder:
                raise RefusedError("EntryNotFound")
            chosen = {n: p for n, p in inside.items() if recursive or p.parent == top}
            document = [self._entry(name, path) for name, path in chosen.items()]
        else:
            document = [self._entry(n, entries[n]) for n in form.get("paths", []) if n in entries]
        self._send(json.dumps(document).encode(), 200, {"Content-Type": "application/json"})

    def _entry(self, name: str, path: Path) -> dict[str, Any]:
        if path.is_dir():
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
        size, sha256 = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
        file = {"type": "file", "oid": _blob_id(path), "size": size, "path": name}
        if sha256 in self.hub.blobs:  # its oid is the pointer's: nothing to go by
            file |= {"oid": "1" * 40, "lfs": {"oid": sha256, "size": size, "pointerSize": 1}}
        return file

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(HTTPStatus(status))
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _blob_id(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324 (git's own)
