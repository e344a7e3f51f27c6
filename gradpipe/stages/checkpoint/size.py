"""How large a checkpoint's weights are on disk, and how large zstd makes them."""

from numcodecs.zstd import Zstd

from gradpipe.stages.checkpoint.folder import Checkpoint

_CHUNK_BYTES = 16 << 20
_LEVEL = 3  # the tool's own default


def file_sizes(checkpoint: Checkpoint) -> tuple[int, int]:
    """Bytes of the safetensors files: as they are, and compressed in chunks of 16 MiB."""
    plain, packed, codec = 0, 0, Zstd(level=_LEVEL)
    for name in checkpoint.files:
        with (checkpoint.folder / name).open("rb") as file:
            while data := file.read(_CHUNK_BYTES):
                plain += len(data)
                packed += len(codec.encode(data))
    return plain, packed
