"""A store's copy on the Hub: a dataset repository, with a card that tells what it is.

A commit there takes seconds, so that objects go in batches. What arrived is known without reading
it back: the Hub lists every file by a hash of its content, git's own or SHA-256.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from gradpipe.errors import GradpipeError, InputError, without_credentials
from gradpipe.store.destination import Advance, Destination
from gradpipe.store.objects import COMMIT_KEY, COPY_KEY, CommitRecord, ObjectReader

CARD = "README.md"
_URL = re.compile(r"hf://datasets/([\w.\-]+/[\w.\-]+)((?:/[^/@]+)*)/?")
_BATCH_BYTES, _BATCH_OBJECTS = 1 << 28, 256  # of one commit
_AHEAD = 16  # objects read while others are sent


class HubDestination(Destination):
    """A dataset repository, or a folder in one."""

    def __init__(self, url: str, *, private: bool) -> None:
        """InputError for what is no dataset repository."""
        found = _URL.fullmatch(url)
        if found is None:
            raise InputError(
                f"{without_credentials(url)}: expected hf://datasets/OWNER/NAME, or a folder in "
                "it: a store on the Hub is a dataset, copied to its main branch"
            )
        super().__init__(url.rstrip("/"))
        self._repo, self._prefix, self._private = found[1], found[2].lstrip("/"), private
        self._api = HfApi()

    def begin(self, record: bytes) -> None:
        """As `Destination`; the repository is made, or must be as private as was asked for."""
        with self._reached():
            try:
                info = self._api.repo_info(self._repo, repo_type="dataset")
            except RepositoryNotFoundError:
                self._api.create_repo(self._repo, repo_type="dataset", private=self._private)
            else:
                if self._private and not info.private:
                    raise InputError(
                        f"--private: {self.url} is there, for all to read: make it private first, "
                        "or give another name"
                    )
            self._commit("Begin a gradient store", {COPY_KEY: record})

    def fill(self, source: ObjectReader, keys: Sequence[str], advance: Advance) -> None:
        """As `Destination`."""
        there = self._hashes()
        sent: dict[str, tuple[str, str]] = {}
        for batch in self._batches(source, keys):
            sent |= {key: _hashes_of(data) for key, data in batch.items()}
            new = {x: data for x, data in batch.items() if there.get(x) not in sent[x]}
            if new:
                with self._told():
                    self._commit("Objects of a gradient store", new)
            advance(len(batch))
        there = self._hashes()
        if lost := [key for key in keys if there.get(key) not in sent[key]]:
            raise GradpipeError(
                f"object {lost[0]} did not arrive at {self.url} as it was sent: run the same "
                "command again"
            )

    def finish(self, record: CommitRecord, card: str) -> None:
        """As `Destination`, in one commit; a card that is there is somebody's own."""
        has_card = bool(self._prefix) or CARD in self.names()
        last = {COMMIT_KEY: record.to_bytes()} | ({} if has_card else {CARD: card.encode()})
        with self._told():
            self._commit("The commit record: the store is complete", last, remove=(COPY_KEY,))

    def tidy(self) -> None:
        """As `Destination`: the last commit did."""

    def _batches(self, source: ObjectReader, keys: Sequence[str]) -> Iterator[dict[str, bytes]]:
        """Objects of the source, in portions for one commit."""
        batch: dict[str, bytes] = {}
        with source.reading_ahead():
            for place, key in enumerate(keys):
                source.begin([], keys[place : place + _AHEAD])
                batch[key] = source.read(key, source.record.objects[key][0])
                held = sum(map(len, batch.values()))
                if held >= _BATCH_BYTES or len(batch) == _BATCH_OBJECTS:
                    yield batch
                    batch = {}
        yield batch

    def _hashes(self) -> dict[str, str]:
        """What the Hub says of every file below: the hash of its content."""
        with self._told():
            entries = self._api.list_repo_tree(
                self._repo, self._prefix or None, repo_type="dataset", recursive=True
            )
            files = [entry for entry in entries if isinstance(entry, RepoFile)]
        return {
            file.path.removeprefix(f"{self._prefix}/"): file.lfs.sha256
            if file.lfs is not None
            else file.blob_id
            for file in files
        }

    def _commit(self, message: str, new: dict[str, bytes], remove: Sequence[str] = ()) -> None:
        self._api.create_commit(
            self._repo,
            [
                *(CommitOperationAdd(self._in_repo(key), data) for key, data in new.items()),
                *(CommitOperationDelete(self._in_repo(key)) for key in remove),
            ],
            commit_message=message,
            repo_type="dataset",
        )

    def _in_repo(self, key: str) -> str:
        return f"{self._prefix}/{key}".lstrip("/")


def _hashes_of(data: bytes) -> tuple[str, str]:
    """By what git and by what its large files are named."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data)  # noqa: S324 (git's own)
    return blob.hexdigest(), hashlib.sha256(data).hexdigest()
