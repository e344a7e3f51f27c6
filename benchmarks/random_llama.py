"""What the benchmarks share: a Llama of random weights to measure on, and how to measure.

A checkpoint and a store are written block by block, so that ones larger than memory can be made;
the same options and seed give the same bytes. By hand:

    python benchmarks/random_llama.py OUT                              # 97.5 M parameters, float32
    python benchmarks/random_llama.py OUT --dtype bfloat16 --hidden 4096 --intermediate 11008 \
        --blocks 16 --heads 32 --blocks-per-shard 1 --store STORE      # 6.6 GB, one block in memory

Sides of a comparison take turns in one run (`interleaved`); memory is measured in a process of its
own for each side, above what the imports took (`peak_of`, `report_peak`).

Shapes: O out, I in.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Final

import numpy as np
import torch
import typer
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from gradpipe.pipeline.progress import peak_memory
from gradpipe.stages.checkpoint.folder import INDEX_NAME, Checkpoint
from gradpipe.stages.checkpoint.tensors import TensorInfo
from gradpipe.store.objects import digest
from gradpipe.store.schema import FORMAT_VERSION, LayerSpec, SampleSpec, StoreSpec
from gradpipe.store.statistics import LayerStats, Sums, is_of_activations
from gradpipe.store.writer import StoreWriter

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MB: Final = 1e6
STATISTICS: Final = ("grad_l1", "grad_l2", "act_l2")  # what `collect` keeps by default
_INIT_STD: Final = 0.02
_NUM_SAMPLES: Final = 128
_SEQ_LEN: Final = 2048

# --- the checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaSize:
    """The shape of the model, and of its files."""

    hidden: int = 768
    blocks: int = 12
    intermediate: int = 2048
    heads: int = 12
    vocab: int = 8192
    positions: int = 2048
    dtype: str = "float32"
    blocks_per_shard: int = 4

    def config(self) -> LlamaConfig:
        """What `from_pretrained` builds."""
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            dtype=self.dtype,
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            max_position_embeddings=self.positions,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
        )

    def shards(self) -> Iterator[dict[str, tuple[int, ...]]]:
        """Shape of each tensor by key, shard by shard."""
        for first in range(0, self.blocks, self.blocks_per_shard):
            last = min(first + self.blocks_per_shard, self.blocks)
            shapes: dict[str, tuple[int, ...]] = {}
            if first == 0:
                shapes["model.embed_tokens.weight"] = (self.vocab, self.hidden)
            for index in range(first, last):
                shapes |= self._block(index)
            if last == self.blocks:
                shapes["model.norm.weight"] = (self.hidden,)
                shapes["lm_head.weight"] = (self.vocab, self.hidden)
            yield shapes

    def _block(self, index: int) -> dict[str, tuple[int, ...]]:
        wide, narrow = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        square = (self.hidden, self.hidden)
        shapes: dict[str, tuple[int, ...]] = {
            **{f"self_attn.{name}_proj": square for name in "qkvo"},
            "mlp.gate_proj": wide,
            "mlp.up_proj": wide,
            "mlp.down_proj": narrow,
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }
        return {f"model.layers.{index}.{name}.weight": s for name, s in shapes.items()}


def write_checkpoint(folder: Path, size: LlamaSize, seed: int = 0) -> None:
    """Write a complete Hugging Face directory; one shard at a time is in memory."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    shards = list(size.shards())
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: _random(shape, size.dtype, generator) for key, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n")
    size.config().save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)


def _random(shape: tuple[int, ...], dtype: str, generator: torch.Generator) -> Tensor:
    """Ones for a norm, normal numbers for a matrix."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=DTYPES[dtype])
    return torch.randn(shape, generator=generator).mul_(_INIT_STD).to(DTYPES[dtype])


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


# --- the store


def write_store(
    model: Path, folder: Path, names: Sequence[str] = STATISTICS, encoding: str = "compact"
) -> None:
    """Write a store of random sums for a checkpoint's blocks; one layer at a time is in memory.

    It costs no forward or backward pass, and stage two cannot tell it from a collected one.
    """
    checkpoint = Checkpoint.open(str(model))
    spec = _store_spec(checkpoint, tuple(names), encoding)
    writer = StoreWriter(folder, spec)
    writer.begin(None)
    generator = np.random.default_rng(0)
    for layer in spec.layers:
        arrays = _random_sums(layer, names, generator)
        num_tokens = _NUM_SAMPLES * _SEQ_LEN
        stats = LayerStats(arrays=arrays, num_samples=_NUM_SAMPLES, num_tokens=num_tokens)
        writer.write_layer(layer, stats)
    writer.commit()


def _store_spec(checkpoint: Checkpoint, names: tuple[str, ...], encoding: str) -> StoreSpec:
    blocks = [i for key, i in checkpoint.tensors.items() if ".layers." in key and i.is_matrix]
    return StoreSpec(
        version=FORMAT_VERSION,
        gradpipe=version("gradpipe"),
        objective="causal-lm",
        model=checkpoint.model_spec(str(checkpoint.config["dtype"])),
        samples=SampleSpec(
            dataset="random",
            revision=None,
            sampling="imported",
            seed=0,
            num_samples=_NUM_SAMPLES,
            seq_len=0,  # no tokens are kept
            digest="",
        ),
        statistics=names,
        encoding=encoding,
        layers=tuple(_layer_spec(checkpoint, info) for info in blocks),
        command="",
    )


def _layer_spec(checkpoint: Checkpoint, info: TensorInfo) -> LayerSpec:
    block = int(info.key.split(".layers.")[1].split(".")[0])
    spec = checkpoint.layer_spec(info.key, block)
    return replace(spec, digest=digest(checkpoint.read_bytes(info.key)))


def _random_sums(
    layer: LayerSpec, names: Sequence[str], generator: np.random.Generator
) -> dict[str, Sums]:
    """Sums as gradients have them: close to rank one, the norms close to each other.

    The spreads, 0.24 and 0.10 in log2, cost 4 and 2.6 bits a weight at 16 levels to a factor of 2.
    """
    column_I = np.exp(generator.standard_normal(layer.shape[1], dtype=np.float32))
    row_O1 = np.exp(generator.standard_normal((layer.shape[0], 1), dtype=np.float32))
    mean_OI = row_O1 * column_I * np.float32(1e-6) * _spread(layer, 0.24, generator)
    sums = {}
    for name in names:
        if is_of_activations(name):
            sums[name] = column_I * _NUM_SAMPLES
        elif name == "grad_l2":
            sums[name] = np.square(mean_OI) * _NUM_SAMPLES
        else:
            sums[name] = mean_OI * _spread(layer, 0.10, generator) * _NUM_SAMPLES
    return sums


def _spread(layer: LayerSpec, deviation: float, generator: np.random.Generator) -> Sums:
    """Factors whose log2 is normal."""
    factor_OI = generator.standard_normal(layer.shape, dtype=np.float32)
    factor_OI *= np.float32(deviation)
    return np.exp2(factor_OI, out=factor_OI)


# --- measuring


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    between: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each side, `repeats` times, the sides taking turns, each warmed up once.

    `between` runs, untimed, after every call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name in list(sides)[:: 1 if repeat % 2 else -1]:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
            between()
    return {name: values[1:] for name, values in seconds.items()}


def median_ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Median over repeats of the ratio: what slows one repeat down slows both its sides."""
    return median(a / b for a, b in zip(seconds, base, strict=True))


def spread(seconds: Sequence[float]) -> str:
    """`median (least to most)`."""
    return f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one side took, in a process of its own."""

    seconds: float
    peak_bytes: int  # above the process as it was after its imports

    @property
    def peak(self) -> str:
        """For a table."""
        return f"{self.peak_bytes / MB:,.0f} MB"


def peak_of(script: str, *arguments: object) -> Usage:
    """Run a script's own side command, which ends in `report_peak`, in a fresh process."""
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Usage(**json.loads(done.stdout.splitlines()[-1]))


def report_peak(work: Callable[[], object]) -> None:
    """Do `work`, and print what it took for `peak_of` to read."""
    before, start = peak_rss(), time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_rss() - before}))


def peak_rss() -> int:
    """Peak resident bytes of this process.

    `ru_maxrss`, as gradpipe itself reports it, but for one flaw: on Linux a child's starts at its
    parent's peak. VmHWM is the same count and starts at zero.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory()
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


# --- reporting


def heading(title: str) -> str:
    """What was run, when, on what."""
    script = Path(sys.argv[0]).name
    lines = (
        f"# {title}",
        "",
        f"- date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"- machine: {machine()}",
        f"- versions: {', '.join(' '.join(x) for x in versions().items())}",
        f"- command: `python benchmarks/{' '.join([script, *sys.argv[1:]])}`",
        "",
    )
    return "\n".join(lines)


def machine() -> str:
    """Processor, cores, memory, system and load."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    system = f"{platform.system()} {platform.release()}, load {os.getloadavg()[0]:.1f} at the end"
    return f"{_cpu_model()}, {cores}, {memory:.0f} GiB RAM; {system}"


def versions() -> dict[str, str]:
    """Of Python, and of the packages that matter."""
    packages = ("gradpipe", "torch", "transformers", "zarr", "numpy", "safetensors")
    return {"Python": platform.python_version(), **{name: version(name) for name in packages}}


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, numbers to the right."""
    rules = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rules, *rows))


SIZE: Final = LlamaSize()


def main(  # noqa: PLR0913, PLR0917 - one parameter per option
    out: Annotated[Path, typer.Argument(help="The directory to write; it must not exist.")],
    hidden: Annotated[int, typer.Option(min=2)] = SIZE.hidden,
    blocks: Annotated[int, typer.Option(min=1)] = SIZE.blocks,
    intermediate: Annotated[int, typer.Option(min=1)] = SIZE.intermediate,
    heads: Annotated[int, typer.Option(min=1)] = SIZE.heads,
    vocab: Annotated[int, typer.Option(min=258)] = SIZE.vocab,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = SIZE.dtype,
    blocks_per_shard: Annotated[int, typer.Option(min=1)] = SIZE.blocks_per_shard,
    seed: int = 0,
    store: Annotated[Path | None, typer.Option(help="Write a store of random sums too.")] = None,
    statistics: Annotated[str, typer.Option(help="Of the store.")] = ",".join(STATISTICS),
    encoding: Annotated[str, typer.Option(help="Of the store.")] = "compact",
) -> None:
    """Write a Llama of random weights, and a gradient store for it."""
    size = LlamaSize(
        hidden=hidden,
        blocks=blocks,
        intermediate=intermediate,
        heads=heads,
        vocab=vocab,
        dtype=dtype,
        blocks_per_shard=blocks_per_shard,
    )
    write_checkpoint(out, size, seed)
    if store is not None:
        write_store(out, store, statistics.split(","), encoding)


if __name__ == "__main__":
    typer.run(main)
