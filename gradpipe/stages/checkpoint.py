"""Checkpoints: Hugging Face model directories, read and rewritten without building a model.

A safetensors file is an 8-byte length, a JSON header and the tensors' bytes; `Checkpoint` knows
where each tensor lies, and reads just those bytes. Weights in pickle files are refused: loading
one runs whatever code is in it.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gradpipe.errors import GradpipeError, InputError, one_line
from gradpipe.store.objects import digest
from gradpipe.store.schema import LayerSpec, ModelSpec

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_NOT_COPIED = (  # weights in any format, and the model card, which an output writes anew
    *(".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"),
    *(".bin.index.json", "README.md"),
)
_FETCHED = (  # from the Hub: weights as safetensors alone, and small files
    *("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*"),
)
_TEMPLATES = "additional_chat_templates/*.jinja"  # the one subfolder that transformers reads
_OTHER_FORMATS = (".gguf", ".h5", ".msgpack", ".onnx", ".tflite")
_COPY_BYTES = 16 << 20
EMBEDDED_NAME = "embedded"  # the model that ships with the package
EMBEDDED_MODEL = Path(__file__).parents[1] / "embedded" / "tiny-llama"

FLOAT_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies."""

    key: str
    file: str  # name of the safetensors file
    dtype: str  # safetensors' name: F32, BF16 ...
    shape: tuple[int, ...]
    start: int  # first byte in the file
    stop: int  # byte after the last

    @property
    def is_matrix(self) -> bool:
        """True for a 2-D float tensor, which is what can be pruned."""
        return len(self.shape) == 2 and self.dtype in FLOAT_TYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint directory: opened, its files were all found and their headers checked."""

    name: str  # as the user gave it
    revision: str | None  # the Hub's commit, None for a local folder
    folder: Path
    config: dict[str, Any]
    files: tuple[str, ...]  # safetensors files, in name order
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, name: str) -> Self:
        """Open a local model directory, a Hub id, or `embedded`.

        Raises InputError if there is none, if its weights are only in pickle files, or if a
        shard is missing or truncated.
        """
        outline = cls.outline(name, fetched=_FETCHED)
        files = _weight_files(name, outline.folder)
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            tensors.update(_read_header(outline.folder / file))
        if files != (SINGLE_NAME,):
            _check_index(name, outline.folder, tensors)
        return replace(outline, files=files, tensors=tensors)

    @classmethod
    def outline(cls, name: str, fetched: tuple[str, ...] = ("config.json",)) -> Self:
        """What `config.json` alone tells: a checkpoint without files and tensors.

        From the Hub only files of these names are `fetched`. Raises InputError if there is none.
        """
        folder, revision = _locate(name, fetched)
        config = _read_json(folder / "config.json")
        return cls(name=name, revision=revision, folder=folder, config=config, files=(), tensors={})

    @property
    def label(self) -> str:
        """The name that stores record: the Hub id, or the last part of a local path."""
        is_path = self.revision is None and self.name != EMBEDDED_NAME
        return Path(self.name).resolve().name if is_path else self.name

    @property
    def architecture(self) -> str:
        """The first of `config.json`'s architectures."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else "unknown"

    @property
    def config_digest(self) -> str:
        """xxh3-128 of `config.json`."""
        return digest((self.folder / "config.json").read_bytes())

    def model_spec(self, dtype: str) -> ModelSpec:
        """What a store says of this checkpoint; `dtype` is what the model computed in."""
        return ModelSpec(
            name=self.label,
            revision=self.revision,
            architecture=self.architecture,
            dtype=dtype,
            config_digest=self.config_digest,
        )

    def companions(self) -> Iterator[Path]:
        """The files beside the weights that a copy needs, relative to the folder."""
        unread = (INDEX_NAME,) if self.files == (SINGLE_NAME,) else ()
        for path in sorted((*self.folder.iterdir(), *self.folder.glob(_TEMPLATES))):
            if path.is_file() and not path.name.endswith((*_NOT_COPIED, *unread)):
                yield path.relative_to(self.folder)

    def layer_spec(self, key: str, block: int | None, *, transposed: bool = False) -> LayerSpec:
        """What a store says of the layer behind a tensor, less the digest of its bytes.

        Raises InputError for one whose values are no floats.
        """
        name = key.removesuffix(".weight")
        check_type(name, self.tensors[key])
        return LayerSpec(
            name=name,
            weight_key=key,
            shape=matrix_shape(self.tensors[key], transposed=transposed),
            block=block,
            transposed=transposed,
            digest="",
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.stop - info.start for info in self.tensors.values())

    def read_bytes(self, key: str) -> bytearray:
        """The raw bytes of one tensor."""
        info = self.tensors[key]
        data = bytearray(info.stop - info.start)
        with (self.folder / info.file).open("rb") as file:
            file.seek(info.start)
            if file.readinto(data) != len(data):
                raise InputError(f"{self.folder / info.file} became shorter while it was read")
        return data

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU, in its own dtype and shape."""
        return as_tensor(self.read_bytes(key), self.tensors[key])


def check_type(layer: str, info: TensorInfo) -> None:
    """Raises InputError for weights that are no floats: quantized ones cannot be pruned."""
    if info.dtype not in FLOAT_TYPES:
        raise InputError(
            f"layer {layer} is of type {info.dtype}: expected F16, BF16, F32 or F64 weights: give "
            "the model before it was quantized"
        )


def as_tensor(data: bytearray, info: TensorInfo) -> Tensor:
    """`data` seen as the float tensor that `info` describes, without a copy."""
    return torch.frombuffer(data, dtype=FLOAT_TYPES[info.dtype]).view(info.shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    return tensor.view(torch.uint8).numpy().data


def _locate(name: str, fetched: tuple[str, ...]) -> tuple[Path, str | None]:
    """Folder and Hub commit of a model, of which at least the files `fetched` are there."""
    folder = EMBEDDED_MODEL if name == EMBEDDED_NAME else Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{name} is not a model directory: it has no config.json")
        return folder, None
    if folder.exists():
        raise InputError(f"{name} is a file, expected a model directory or a Hub id")
    return _download(name, fetched)


def _download(name: str, fetched: tuple[str, ...]) -> tuple[Path, str | None]:
    """Fetch a model's files of these names from the Hub, or its cache."""
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*fetched]))
    except Exception as error:  # the Hub client raises from many families
        raise InputError(
            f"{name} is neither a model directory nor a Hub id that can be fetched: "
            f"{one_line(error)}"
        ) from error
    if not (folder / "config.json").is_file():
        raise InputError(f"{name} has no config.json on the Hub: expected a transformers model")
    return folder, folder.name


def _weight_files(name: str, folder: Path) -> tuple[str, ...]:
    """Names of the safetensors files, all of them present; as transformers, one file first."""
    if (folder / SINGLE_NAME).is_file():
        return (SINGLE_NAME,)
    if not (folder / INDEX_NAME).is_file():
        raise _no_weights(name, folder)
    weight_map = _read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{folder / INDEX_NAME} has no weight_map: restore it")
    files = tuple(sorted(set(map(str, weight_map.values()))))
    if odd := [file for file in files if Path(file).name != file]:
        raise InputError(f"{folder / INDEX_NAME} names a file outside the checkpoint: {odd[0]}")
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise InputError(
            f"{name} lacks {len(missing)} of {len(files)} shards, first {missing[0]}: fetch it"
        )
    return files


def _no_weights(name: str, folder: Path) -> InputError:
    """The error of a folder without safetensors files to load: what is there, and what to do."""
    names = sorted(path.name for path in folder.iterdir())
    if broken := [x for x in (SINGLE_NAME, INDEX_NAME) if x in names]:
        return InputError(f"{name}: {broken[0]} is a link to nothing, or no file: fetch it again")
    if shards := [x for x in names if x.endswith(".safetensors")]:
        return InputError(
            f"{name} has safetensors files such as {shards[0]}, but neither {SINGLE_NAME} nor "
            f"{INDEX_NAME}, which says what is in them: fetch that too"
        )
    if pickles := [x for x in names if Path(x).suffix in {".bin", ".pt", ".pth"}]:
        return InputError(
            f"{name} holds its weights as pickle ({pickles[0]}), which can run code when loaded: "
            "convert it with AutoModel.from_pretrained(…).save_pretrained(…, "
            "safe_serialization=True) and give the new folder"
        )
    if others := [x for x in names if x.endswith(_OTHER_FORMATS)]:
        return InputError(
            f"{name} holds its weights as {others[0]}, expected {SINGLE_NAME} or {INDEX_NAME}: "
            "give the safetensors model that it was made from"
        )
    return InputError(
        f"{name} has no weights, expected {SINGLE_NAME} or {INDEX_NAME}: fetch it again"
    )


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of one safetensors file, once the library has found the file sound."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is not a whole safetensors file ({error}): fetch it again"
        ) from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    base = 8 + length
    return {
        key: TensorInfo(
            key=key,
            file=path.name,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            start=base + entry["data_offsets"][0],
            stop=base + entry["data_offsets"][1],
        )
        for key, entry in header.items()
    }


def _check_index(name: str, folder: Path, tensors: dict[str, TensorInfo]) -> None:
    """The index and the files must tell of the same tensors in the same places."""
    for key, file in _read_json(folder / INDEX_NAME)["weight_map"].items():
        if key not in tensors or tensors[key].file != file:
            raise InputError(
                f"{name}: {INDEX_NAME} says that {key} is in {file}, which does not hold it"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} holds {type(document).__name__}, expected a JSON object")
    return document


def matrix_shape(info: TensorInfo, *, transposed: bool) -> tuple[int, ...]:
    """(out, in) of a tensor on disk."""
    return info.shape[::-1] if transposed else info.shape


def count_zeros(tensor: Tensor) -> int:
    """How many of a float tensor's values are zero."""
    return int((tensor == 0).count_nonzero())  # counting floats directly takes ten times as long


def rewrite(
    source: Path, outputs: Sequence[Path], replaced: Iterable[tuple[TensorInfo, Iterable[Tensor]]]
) -> None:
    """Copy a safetensors file to each output, with some tensors replaced, and make it durable.

    `replaced` comes in file order: each tensor's place and one new value for each output.
    """
    with ExitStack() as stack:
        reader = stack.enter_context(source.open("rb"))
        writers = [stack.enter_context(path.open("wb")) for path in outputs]
        for info, tensors in replaced:
            _copy(reader, writers, info.start - reader.tell())
            _write(writers, tensors)
            reader.seek(info.stop)
        _copy(reader, writers, source.stat().st_size - reader.tell())
        for writer in writers:
            writer.flush()
            os.fsync(writer.fileno())


def _write(writers: Sequence[BinaryIO], tensors: Iterable[Tensor]) -> None:
    """One tensor to each writer; none outlives its turn."""
    for writer, tensor in zip(writers, tensors, strict=True):
        writer.write(tensor_bytes(tensor))


def _copy(reader: BinaryIO, writers: Sequence[BinaryIO], num_bytes: int) -> None:
    """Copy the next bytes to every writer."""
    while num_bytes:
        data = reader.read(min(num_bytes, _COPY_BYTES))
        if not data:
            raise GradpipeError(f"{reader.name} became shorter while it was copied")
        for writer in writers:
            writer.write(data)
        num_bytes -= len(data)
