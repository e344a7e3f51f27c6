"""Where a checkpoint is: a local folder, the embedded model, or the Hub; found without torch."""

from pathlib import Path

from gradpipe.errors import InputError, did_you_mean, one_line

EMBEDDED_NAME = "embedded"  # the model that ships with the package
EMBEDDED_MODEL = Path(__file__).parents[2] / "embedded" / "tiny-llama"


def locate(name: str, fetched: tuple[str, ...] = ("config.json",)) -> tuple[Path, str | None]:
    """Folder and Hub commit of a model, of which at least the files `fetched` are there.

    Raises InputError if there is none.
    """
    folder = EMBEDDED_MODEL if name == EMBEDDED_NAME else Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            if (folder / "adapter_config.json").is_file():
                raise InputError(
                    f"{name} is an adapter alone (adapter_config.json): merge it into the model "
                    "that it is for, and give the result"
                )
            inside = sorted(path.parent for path in folder.glob("*/config.json"))
            hint = f": give one of the {len(inside)} in it, such as {inside[0]}" if inside else ""
            raise InputError(f"{name} is not a model directory: it has no config.json{hint}")
        return folder, None
    if folder.exists():
        raise InputError(f"{name} is a file, expected a model directory or a Hub id")
    return _download(name, fetched)


def _download(name: str, fetched: tuple[str, ...]) -> tuple[Path, str | None]:
    """Fetch a model's files of these names from the Hub, or its cache."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 (local folders need none of it)

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*fetched]))
    except Exception as error:  # the Hub client raises from many families
        raise InputError(
            f"{name} is neither a model directory nor a Hub id that can be fetched: "
            f"{one_line(error)}{did_you_mean(name, [EMBEDDED_NAME])}"
        ) from error
    if not (folder / "config.json").is_file():
        raise InputError(f"{name} has no config.json on the Hub: expected a transformers model")
    return folder, folder.name
