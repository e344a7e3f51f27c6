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
        weights: dict[str, dict[int, LayerSpec]] = {}
        for layer in layers:
            name, expert = _name_of(layer, names)
            weights.setdefault(name, {})[expert] = layer
            if (count := _num_experts(weights[name])) > _MOST_EXPERTS:
                raise InputError(
                    f"--format imatrix: layer {layer.name} is one of {count} experts, expected at "
                    f"most {_MOST_EXPERTS}: leave it out with --layer"
                )
        return cls(store=store, weights=dict(sorted(weights.items())))

    def write(self, path: Path) -> None:
        """Write the file; tensors are small, and are all in memory."""
        samples = self.store.spec.samples
        writer = gguf.GGUFWriter(path, _ARCHITECTURES[self.store.spec.model.architecture])
        writer.add_type(gguf.GGUFType.IMATRIX)
        writer.add_array("imatrix.datasets", [samples.dataset])
        writer.add_uint32("imatrix.chunk_count", samples.num_samples)
        writer.add_uint32("imatrix.chunk_size", samples.seq_len)
        for name, experts in self.weights.items():
            sums, counts = self._sums(experts)
            writer.add_tensor(f"{name}.in_sum2", sums)
            writer.add_tensor(f"{name}.counts", counts)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _sums(self, experts: dict[int, LayerSpec]) -> tuple[Sums, Sums]:
        """Squares (experts, inputs) and tokens (experts, 1); 0 for an expert that is not stored."""
        count, width = _num_experts(experts), next(iter(experts.values())).shape[1]
        sums = np.zeros((count, width), dtype=np.float32)
        counts = np.zeros((count, 1), dtype=np.float32)
        for expert, layer in experts.items():
            item = self.store.read(layer, [_STATISTIC])[_STATISTIC]
            is_exact = item.spec.encoding == "float32"
            norms = self.store.read_norms(layer, _STATISTIC)
            sums[expert] = item.parts["values"] if is_exact else np.square(norms)
            counts[expert] = item.spec.num_tokens
        return sums, counts


def _num_experts(experts: dict[int, LayerSpec]) -> int:
    """Of one weight: as many as its tensor has parts, or as the numbers of those stored need."""
    part = next(iter(experts.values())).part
    return 1 + max(experts) if part is None else part[1]


def _names(architecture: str, num_blocks: int) -> Any:
    """What weights are called once they are converted."""
    of_gguf = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(of_gguf[_ARCHITECTURES[architecture]], num_blocks)


def _name_of(layer: LayerSpec, names: Any) -> tuple[str, int]:
    """A layer's weight in GGUF, and which of its experts it is; InputError if it has no name."""
    name, expert = layer.weight_key.removesuffix(".weight").replace("language_model.", ""), 0
    if found := _EXPERT.fullmatch(name):
        name, expert = f"{found[1]}.{found[3]}", int(found[2])
    if layer.part is not None:
        expert = layer.part[0]
    known: str | None = names.get_name(name)
    if known is None:
        raise InputError(
            f"--format imatrix: layer {layer.name} has no name in llama.cpp: leave it out with "
            "--layer"
        )
    return f"{known}.weight", expert
