"""llama.cpp's importance matrix, from the squared inputs that a store has summed.

Format: `IMatrixCollector::save_imatrix` and `collect_imatrix` of llama.cpp, tools/imatrix. For each
weight two float32 tensors: `NAME.in_sum2`, the sum over tokens of each input's square, and
`NAME.counts`, the number of tokens; of experts one row and one count each, those routed to it. Our
`act_l2` is that sum. Names are those of a converted model; the `gguf` package has them. Converting
reorders outputs of some layers (Llama's q and k), never the inputs.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from gradpipe.errors import InputError
from gradpipe.store.reader import GradientStore
from gradpipe.store.schema import LayerSpec
from gradpipe.store.statistics import Sums

try:
    import gguf
except ImportError as error:
    raise InputError("--format imatrix needs gguf: pip install 'gradpipe[gguf]'") from error

_STATISTIC = "act_l2"
_MOST_EXPERTS = 1 << 12  # of one tensor: a store may say any number, and each takes a row
_ARCHITECTURES = {  # of transformers -> of llama.cpp
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "GemmaForCausalLM": "gemma",
    "GPT2LMHeadModel": "gpt2",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "OlmoeForCausalLM": "olmoe",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
}
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")  # whose matrices lie in one tensor there


@dataclass(frozen=True, slots=True, kw_only=True)
class Imatrix:
    """An importance matrix to be written, one weight at a time."""

    store: GradientStore
    weights: dict[str, dict[int, LayerSpec]]  # by GGUF name: layers by expert; one is expert 0
    num_experts: dict[str, int]  # by GGUF name: as many as the model has, whatever is exported

    @classmethod
    def of(cls, store: GradientStore, layers: Iterable[LayerSpec]) -> Self:
        """InputError if the store lacks the inputs, or llama.cpp the model."""
        spec = store.spec
        if _STATISTIC not in spec.statistics or not spec.samples.digest:
            raise InputError(
                f"store {store.url} has no {_STATISTIC} with its tokens counted: collect with "
                f"--statistics {_STATISTIC}"
            )
        if spec.model.architecture not in _ARCHITECTURES:
            raise InputError(
                f"--format imatrix: no names are known for {spec.model.architecture:.80}, expected "
                f"one of {', '.join(_ARCHITECTURES)}"
            )
        names = _names(spec.model.architecture, 1 + max(x.block or 0 for x in spec.layers))
        counts = _count_experts(spec.layers)
        weights: dict[str, dict[int, LayerSpec]] = {}
        num_experts: dict[str, int] = {}
        for layer in layers:
            weight, expert = _expert_of(layer)
            if (count := counts[weight]) > _MOST_EXPERTS:
                raise InputError(
                    f"--format imatrix: layer {layer.name} is one of {count} experts, expected at "
                    f"most {_MOST_EXPERTS}: leave it out with --layer"
                )
            name = _name_of(layer, weight, names)
            weights.setdefault(name, {})[expert] = layer
            num_experts[name] = count
        return cls(store=store, weights=dict(sorted(weights.items())), num_experts=num_experts)

    def write(self, path: Path) -> None:
        """Write the file; tensors are small, and are all in memory."""
        samples = self.store.spec.samples
        writer = gguf.GGUFWriter(path, _ARCHITECTURES[self.store.spec.model.architecture])
        writer.add_type(gguf.GGUFType.IMATRIX)
        writer.add_array("imatrix.datasets", [samples.dataset])
        writer.add_uint32("imatrix.chunk_count", samples.num_samples)
        writer.add_uint32("imatrix.chunk_size", samples.seq_len)
        for name, experts in self.weights.items():
            sums, counts = self._sums(experts, self.num_experts[name])
            writer.add_tensor(f"{name}.in_sum2", sums)
            writer.add_tensor(f"{name}.counts", counts)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _sums(self, experts: dict[int, LayerSpec], count: int) -> tuple[Sums, Sums]:
        """Squares (experts, inputs) and tokens (experts, 1); 0 for an expert that is left out."""
        width = next(iter(experts.values())).shape[1]
        sums = np.zeros((count, width), dtype=np.float32)
        counts = np.zeros((count, 1), dtype=np.float32)
        for expert, layer in experts.items():
            item = self.store.read(layer, [_STATISTIC])[_STATISTIC]
            is_exact = item.spec.encoding == "float32"
            norms = self.store.read_norms(layer, _STATISTIC)
            sums[expert] = item.parts["values"] if is_exact else np.square(norms)
            counts[expert] = item.spec.num_tokens
        return sums, counts


def _count_experts(layers: Iterable[LayerSpec]) -> dict[str, int]:
    """By weight: as many as its tensor has parts, or as the numbers of the model's need."""
    counts: dict[str, int] = {}
    for layer in layers:
        weight, expert = _expert_of(layer)
        count = 1 + expert if layer.part is None else layer.part[1]
        counts[weight] = max(count, counts.get(weight, 0))
    return counts


def _names(architecture: str, num_blocks: int) -> Any:
    """What weights are called once they are converted."""
    of_gguf = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(of_gguf[_ARCHITECTURES[architecture]], num_blocks)


def _expert_of(layer: LayerSpec) -> tuple[str, int]:
    """A layer's weight without the number of its expert, and that number; 0 if it is no expert."""
    name = layer.weight_key.removesuffix(".weight").replace("language_model.", "")
    if layer.part is not None:
        return name, layer.part[0]
    found = _EXPERT.fullmatch(name)
    return (f"{found[1]}.{found[3]}", int(found[2])) if found else (name, 0)


def _name_of(layer: LayerSpec, weight: str, names: Any) -> str:
    """A layer's weight in GGUF; InputError if it has no name."""
    known: str | None = names.get_name(weight)
    if known is None:
        raise InputError(
            f"--format imatrix: layer {layer.name} has no name in llama.cpp: leave it out with "
            "--layer"
        )
    return f"{known}.weight"
