"""A pruned checkpoint to the Hub, once it is complete here."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from gradpipe.errors import GradpipeError, InputError, one_line
from gradpipe.options import Option

_NAME = re.compile(r"[\w.\-]+/[\w.\-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class PushConfig:
    """Where to, if anywhere."""

    push_to_hub: Annotated[
        str | None,
        Option(help="Then upload the checkpoint to this model repository.", metavar="OWNER/NAME"),
    ] = None
    private: Annotated[bool, Option(help="Create it for yourself alone.")] = False

    def __post_init__(self) -> None:
        if self.private and self.push_to_hub is None:
            raise InputError("--private: of a repository that --push-to-hub creates: leave it out")
        name = self.push_to_hub
        if name is not None and (".." in name or not _NAME.fullmatch(name)):
            raise InputError(f"--push-to-hub {name}: expected OWNER/NAME")

    def check(self) -> None:
        """InputError if nobody is logged in: before the work is done, not after."""
        if self.push_to_hub is None:
            return
        from huggingface_hub import get_token  # noqa: PLC0415 (most runs need none)

        if get_token() is None:
            raise InputError(
                f"--push-to-hub {self.push_to_hub}: no token: run hf auth login, or set HF_TOKEN"
            )

    def repositories(self, folders: Mapping[str, Path]) -> dict[str, Path]:
        """The repository of each folder: of several, by its label."""
        name = self.push_to_hub
        if name is None:
            return {}
        if len(folders) == 1:
            return dict(zip((name,), folders.values(), strict=True))
        return {f"{name}-{label}": folder for label, folder in folders.items()}


def push(repository: str, folder: Path, *, private: bool) -> str:
    """Upload a folder as one commit, and create the repository if it is new; returns its URL.

    GradpipeError if the Hub refuses or cannot be reached: the folder is complete all the same.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415 (most runs need none)

    api = HfApi()
    try:
        if not api.repo_exists(repository):
            api.create_repo(repository, private=private)
        found = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="A checkpoint by gradpipe"
        )
    except Exception as error:  # the Hub's client raises from many families
        raise GradpipeError(
            f"{folder} is complete, and cannot be uploaded to {repository} ({one_line(error)}): "
            f"run hf upload {repository} {folder}"
        ) from error
    return str(found.repo_url)
