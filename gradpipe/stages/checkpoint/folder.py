"""Checkpoints: Hugging Face model directories, read and rewritten without building a model.

A safetensors file is an 8-byte length, a JSON header and the tensors' bytes; `Checkpoint` knows
where each tensor lies, and reads just those bytes. Weights in pickle files are refused: loading
one runs whatever code is in it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from gradpipe.errors import InputError
from gradpipe.stages.checkpoint.place import EMBEDDED_NAME, locate
from gradpipe.stages.checkpoint.tensors import (
    TensorInfo,
    as_tensor,
    check_type,
    matrix_shape,
    read_header,
)
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
        _check_no_adapter(name, outline.folder)
        files = _weight_files(name, outline.folder)
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            tensors.update(read_header(outline.folder / file))
        if files != (SINGLE_NAME,):
            _check_index(name, outline.folder, tensors)
        return replace(outline, files=files, tensors=tensors)

    @classmethod
    def outline(cls, name: str, fetched: tuple[str, ...] = ("config.json",)) -> Self:
        """What `config.json` alone tells: a checkpoint without files and tensors.

        From the Hub only files of these names are `fetched`. Raises InputError if there is none.
        """
        folder, revision = locate(name, fetched)
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

    @property
    def tensors_digest(self) -> str:
        """xxh3-128 of the tensors' names, types, shapes and places: not of their values."""
        return digest(repr(sorted(self.tensors.items())).encode())

    def content_digest(self) -> str:
        """xxh3-128 of `config.json` and of all tensors, whatever files they are in: reads them."""
        parts = {
            key: (info.dtype, info.shape, digest(self.read_place(info)))
            for key, info in sorted(self.tensors.items())
        }
        return digest(repr((self.config_digest, parts)).encode())

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

    def layer_spec(
        self,
        key: str,
        block: int | None,
        *,
        transposed: bool = False,
        part: tuple[int, int] | None = None,
    ) -> LayerSpec:
        """What a store says of the layer behind a tensor or a part, less the digest of its bytes.

        Raises InputError for one whose values are no floats.
        """
        info = self.tensors[key] if part is None else self.tensors[key].part(*part)
        name = key.removesuffix(".weight") + ("" if part is None else f".{part[0]}")
        check_type(name, info)
        return LayerSpec(
            name=name,
            weight_key=key,
            shape=matrix_shape(info, transposed=transposed),
            block=block,
            transposed=transposed,
            digest="",
            part=part,
        )

    def place(self, layer: LayerSpec) -> TensorInfo:
        """Where a layer's weights lie; InputError if its tensor has no such part."""
        info = self.tensors[layer.weight_key]
        return info if layer.part is None else info.part(*layer.part)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.stop - info.start for info in self.tensors.values())

    def read_bytes(self, key: str) -> memoryview:
        """The raw bytes of one tensor."""
        return self.read_place(self.tensors[key])

    def read_place(self, info: TensorInfo) -> memoryview:
        """The raw bytes of a tensor, or of a part of one, where PyTorch would have them begin."""
        data = torch.empty(info.stop - info.start, dtype=torch.uint8).numpy().data
        with (self.folder / info.file).open("rb") as file:
            file.seek(info.start)
            if file.readinto(data) != len(data):
                raise InputError(f"{self.folder / info.file} became shorter while it was read")
        return data

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU, in its own dtype and shape."""
        return as_tensor(self.read_bytes(key), self.tensors[key])


def check_unquantized(checkpoint: Checkpoint) -> None:
    """Raises InputError for codes: they have no gradients, and cannot be pruned as weights."""
    quantization = checkpoint.config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise InputError(
            f"{checkpoint.name} is quantized ({method or 'quantization_config'} in its "
            "config.json), expected float weights: give the model before it was quantized"
        )


def _weight_files(name: str, folder: Path) -> tuple[str, ...]:
    """Names of the safetensors files, all of them present; as transformers, one file first."""
    if (folder / SINGLE_NAME).is_file():
        return (SINGLE_NAME,)
    if not (folder / INDEX_NAME).is_file():
        raise _no_weights(name, folder)
    index = _read_json(folder / INDEX_NAME)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{folder / INDEX_NAME} has no weight_map: restore it")
    if not isinstance(index.get("metadata"), dict):
        raise InputError(
            f"{folder / INDEX_NAME} has no metadata, without which transformers loads no model: "
            'add "metadata": {} to it'
        )
    files = tuple(sorted(set(map(str, weight_map.values()))))
    if odd := [file for file in files if Path(file).is_absolute() or ".." in Path(file).parts]:
        raise InputError(f"{folder / INDEX_NAME} names a file outside the checkpoint: {odd[0]}")
    if odd := [file for file in files if Path(file).name != file]:
        raise InputError(
            f"{folder / INDEX_NAME} names {odd[0]}, expected files beside it: move that one there, "
            "and name it without a folder"
        )
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise InputError(
            f"{name} lacks {len(missing)} of {len(files)} shards, first {missing[0]}: fetch it"
        )
    return files


def _check_no_adapter(name: str, folder: Path) -> None:
    """Refuse weights that transformers would change as it loads them, if peft is there."""
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{name} has an adapter (adapter_config.json), which transformers adds to the weights "
            "where peft is installed: merge it into them, or move it away"
        )


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


def _check_index(name: str, folder: Path, tensors: dict[str, TensorInfo]) -> None:
    """The index and the files must tell of the same tensors in the same places."""
    for key, file in _read_json(folder / INDEX_NAME)["weight_map"].items():
        if key not in tensors:
            raise InputError(
                f"{name}: {INDEX_NAME} says that {key} is in {file}, which does not hold it"
            )
        if (other := tensors[key].file) == file:
            continue
        if key in read_header(folder / file):
            raise InputError(
                f"{name}: {key} is in {file}, which {INDEX_NAME} names, and in {other}, which is "
                "what transformers reads: leave it in one of them"
            )
        raise InputError(
            f"{name}: {INDEX_NAME} says that {key} is in {file}, which does not hold it: {other} "
            "does: mend the index"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} holds {type(document).__name__}, expected a JSON object")
    return document
