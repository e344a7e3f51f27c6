"""From the checkpoint's tensors to the model's, by transformers' own conversion.

transformers keeps the rules (`conversion_mapping.py`): a checkpoint saved without its head, from an
older class or by another company has other names, and experts one by one or all queries, keys and
values in one tensor. What `from_pretrained` does with them at once is done here part by part, so
that one block can be loaded alone. Nothing is guessed: a tensor that no rule names is not taken.
"""

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from gradpipe.errors import InputError
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.checkpoint.tensors import TYPES, TensorInfo, check_type

_ADAPTER = re.compile(r"\.lora_[A-Za-z]\w*(\.|$)|\.lora_magnitude_vector")
_WRAPPERS = {"base_model.model.": "PEFT", "_orig_mod.": "torch.compile", "module.": "DataParallel"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Tensors of a checkpoint that one or several of the model's are made from, together."""

    targets: tuple[str, ...]  # in the model
    keys: tuple[str, ...]  # in the checkpoint
    patterns: tuple[str, ...]  # of the rule: which one each key matched
    rule: WeightConverter | None  # None: the one tensor as it is, under another name

    def make(self, read: Callable[[str], Tensor], model: Any) -> dict[str, Tensor]:
        """The model's tensors from what `read` gives for `keys`, in the dtype of their target."""
        if self.rule is None:
            return {self.targets[0]: read(self.keys[0])}
        if places := self.places():
            return {self.targets[0]: _stacked(places, read)}
        rule: Any = deepcopy(self.rule)
        for key, pattern in zip(self.keys, self.patterns, strict=True):
            rule.add_tensor(self.targets[0], key, pattern, read(key))
        made = rule.convert(self.targets[0], model=model, config=model.config)
        return {name: x[0] if isinstance(x, list) else x for name, x in made.items()}

    def places(self) -> list[tuple[str, ...]]:
        """Of experts that the checkpoint holds one by one: their keys, row below row; else []."""
        if self.rule is None:
            return []
        kinds = [(type(x), getattr(x, "dim", None)) for x in self.rule.operations]
        if kinds not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
            return []
        pairs = list(zip(self.patterns, self.keys, strict=True))
        columns = [
            [key for x, key in pairs if x == pattern] for pattern in self.rule.source_patterns
        ]
        return list(zip(*columns, strict=True))

    def swaps(self, stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool | None:
        """Of one tensor of three dimensions, whether the last two swap; None if more is done.

        `stored` is its shape in the checkpoint, `wanted` in the model.
        """
        match self.rule and self.rule.operations:
            case None:
                return False
            case [Transpose(dim0=1, dim1=2, check_dims=is_checked)]:
                return not (is_checked and stored == wanted)
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where each of a model's parameters and persistent buffers comes from."""

    checkpoint: Checkpoint
    by_name: dict[str, Source]  # a tied parameter has the source of the one that it is tied to

    def key(self, name: str) -> str | None:
        """The tensor that the parameter is, unchanged; None if it is made from others."""
        source = self.by_name[name]
        return source.keys[0] if source.rule is None else None


def find_sources(model: Any, checkpoint: Checkpoint) -> Sources:
    """The sources of a skeleton, as `from_pretrained` would find them.

    Raises InputError for a parameter without one, and for a tensor of another shape.
    """
    stored = dict(model.state_dict(keep_vars=True))
    found: dict[str, Source] = {}
    for source in _grouped(model, checkpoint, stored):
        made = _made_on_meta(source, checkpoint, model, stored)
        whole = replace(source, targets=made)
        found |= {name: whole for name in made if name in stored}
    by_identity = {id(stored[name]): source for name, source in found.items()}
    for name, tensor in stored.items():
        if name not in found and id(tensor) in by_identity:
            found[name] = by_identity[id(tensor)]
    _check_whole(model, checkpoint, stored.keys() - found.keys())
    _check_no_adapter(model, checkpoint, {key for x in found.values() for key in x.keys})
    return Sources(checkpoint=checkpoint, by_name=found)


def _grouped(model: Any, checkpoint: Checkpoint, stored: dict[str, Tensor]) -> list[Source]:
    """The checkpoint's tensors, those that go into one rule together."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = model.base_model_prefix
    taken: dict[str, list[tuple[str, str | None]]] = {}
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, stored)
        if name not in stored and key in stored:
            name, pattern = rename_source_key(key, [], [], prefix, stored)
        if name in stored:
            taken.setdefault(name, []).append((key, pattern))
    return [_source(name, pairs, by_pattern) for name, pairs in taken.items()]


def _source(
    name: str, pairs: list[tuple[str, str | None]], rules: dict[str, WeightConverter]
) -> Source:
    first = pairs[0][1]
    same = [(key, pattern) for key, pattern in pairs if (pattern is None) == (first is None)]
    if first is None:
        return Source(targets=(name,), keys=(same[0][0],), patterns=(), rule=None)
    return Source(
        targets=(name,),
        keys=tuple(key for key, _ in same),
        patterns=tuple(str(pattern) for _, pattern in same),
        rule=rules[first],
    )


def _made_on_meta(
    source: Source, checkpoint: Checkpoint, model: Any, stored: dict[str, Tensor]
) -> tuple[str, ...]:
    """The names of what is made, once its shapes are seen to be the model's."""
    infos = [checkpoint.tensors[key] for key in source.keys]
    try:
        made = source.make(lambda key: _on_meta(checkpoint.tensors[key]), model)
    except Exception as error:  # the operations raise what they like
        raise InputError(
            f"{checkpoint.name}: {source.targets[0]} cannot be made from {source.keys[0]} "
            f"{infos[0].shape} and its like: weights and config.json are of different models"
        ) from error
    for name, tensor in made.items():
        expected = tuple(stored[name].shape) if name in stored else tuple(tensor.shape)
        if tuple(tensor.shape) != expected:
            raise InputError(
                f"{checkpoint.name}: tensor {source.keys[0]} is {infos[0].shape}, by its "
                f"config.json {expected}: weights and config.json are of different models"
            )
        if name in stored and stored[name].is_floating_point():
            check_type(source.keys[0].removesuffix(".weight"), infos[0])
    return tuple(made)


def _stacked(places: list[tuple[str, ...]], read: Callable[[str], Tensor]) -> Tensor:
    """(experts, rows of all keys, columns), filled one by one: there is room for it only once."""
    first = read(places[0][0])
    height = len(first)
    stack = first.new_empty(len(places), height * len(places[0]), *first.shape[1:])
    for part, keys in zip(stack, places, strict=True):
        for index, key in enumerate(keys):
            part[index * height : (index + 1) * height].copy_(read(key))
    return stack


def _on_meta(info: TensorInfo) -> Tensor:
    return torch.empty(info.shape, dtype=TYPES.get(info.dtype, torch.uint8), device="meta")


def _check_whole(model: Any, checkpoint: Checkpoint, missing: set[str]) -> None:
    """Refuse what transformers would make up: it draws missing weights at random."""
    ignored = model._keys_to_ignore_on_load_missing or ()  # noqa: SLF001 (from_pretrained's way)
    missing = {name for name in missing if not any(re.search(x, name) for x in ignored)}
    if missing:
        raise missing_weights(checkpoint, type(model).__name__, missing)


def _check_no_adapter(model: Any, checkpoint: Checkpoint, taken: set[str]) -> None:
    """Refuse an adapter's tensors among the weights: transformers would leave them out."""
    ignored = model._keys_to_ignore_on_load_unexpected or ()  # noqa: SLF001 (from_pretrained's way)
    for key in sorted(checkpoint.tensors.keys() - taken):
        if _ADAPTER.search(key) and not any(re.search(x, key) for x in ignored):
            raise InputError(
                f"{checkpoint.name} holds an adapter beside its weights ({key}), which "
                "transformers leaves out: merge it into them"
            )


def missing_weights(checkpoint: Checkpoint, kind: str, missing: set[str]) -> InputError:
    """The error of weights that the model needs and the checkpoint has not: what it has instead."""
    if wrapped := next((x for x in checkpoint.tensors if ".base_layer." in x), None):
        return InputError(
            f"{checkpoint.name}: {wrapped} and its like are named as PEFT wraps them: merge the "
            "adapter into the weights (merge_and_unload), and save the model"
        )
    first, given = min(missing, key=dot_natural_key), next(iter(checkpoint.tensors), "none")
    for prefix, author in _WRAPPERS.items():
        if given.startswith(prefix):
            return InputError(
                f"{checkpoint.name}: its tensors are named {prefix}…, as {author} wraps a model: "
                "save the model that is inside, without the wrapper"
            )
    return InputError(
        f"{checkpoint.name}: its files hold nothing for {len(missing)} of the tensors of "
        f"{kind}, first {first} (they hold {given} …): the weights were saved from another kind "
        "of model, or not all of them"
    )
