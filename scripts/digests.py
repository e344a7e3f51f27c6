"""Digests of what gradpipe computes: a table to hold every later commit against.

    python scripts/digests.py                                    # print the table
    python scripts/digests.py --write tests/data/digests.json
    python scripts/digests.py --check tests/data/digests.json    # exit 1 if an entry differs

Tiny random models are collected and pruned in a temporary folder, in most of the ways that there
are. An entry is xxh3-128 over sorted (key, digest) pairs:

    collect/<case>/data          the chunks of all arrays under `layers/` and `calibration/`
    collect/<case>/attributes    what each statistic says of itself in its `zarr.json`
    collect/<case>/norms         every statistic as `read_norms` decodes it
    prune/<case>/<target>        the safetensors files of one pruned checkpoint

The root's `zarr.json` and the commit record, which name versions and commands, are left out. Only
the public interface is used, and one thread. Another processor, PyTorch or NumPy may round
otherwise: --check says where they are others. With TMPDIR=/dev/shm it need not wait for a disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Final

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # read by what follows

import torch
import transformers
import xxhash
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import gradpipe

Options = dict[str, Any]
Digests = dict[str, str]

PACKAGES: Final = ("torch", "numpy", "transformers", "safetensors", "zarr", "numcodecs", "pillow")
WORDS: Final = tuple(f"w{i}" for i in range(92))

_TOKENS: Final = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHARED: Final[Options] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_COMMON: Final[Options] = {**_TOKENS, **_SHARED, "max_position_embeddings": 64}
_DROPOUTS: Final = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
_GPT2: Final[Options] = {**_COMMON, "n_inner": 56, **_DROPOUTS}
_OPT: Final[Options] = {**_COMMON, "ffn_dim": 56, "word_embed_proj_dim": 32, "dropout": 0.0}
_LLAMA: Final[Options] = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 160}
_EXPERTS: Final[Options] = {**_LLAMA, "intermediate_size": 24, "num_experts_per_tok": 2}
_QWEN3: Final[Options] = {"head_dim": 16, "moe_intermediate_size": 24, "num_experts": 6}
_IMAGES: Final[Options] = {"image_size": 16, "patch_size": 4, "num_labels": 3}


@dataclass(frozen=True, slots=True)
class Toy:
    """A checkpoint to build: of a type, by options of its config, in a dtype, from a seed."""

    kind: str
    config: Options
    dtype: torch.dtype = torch.float32
    seed: int = 0
    max_file: str = "5GB"


TOYS: Final = {
    "llama": Toy("llama", _LLAMA, max_file="60KB"),  # several files; two of SparseGPT's 128 columns
    "gpt2": Toy("gpt2", _GPT2),  # weights lie as (in, out)
    "opt": Toy("opt", _OPT),
    "mixtral": Toy("mixtral", {**_EXPERTS, "num_local_experts": 3}),
    "qwen3_moe": Toy("qwen3_moe", {**_EXPERTS, **_QWEN3}),
    "vit": Toy("vit", {**_SHARED, "intermediate_size": 56, **_IMAGES}),
    "llama-bf16": Toy("llama", _LLAMA, torch.bfloat16),
    "gpt2-fp16": Toy("gpt2", _GPT2, torch.float16),
}

SCHEDULES: Final = ("resident", "streamed")
ALL: Final = ("grad_l1", "grad_l2", "grad_sum", "act_l2", "act_sum", "hessian", "grad_cov")
WAYS: Final = (  # to collect: schedule, encoding, batch size, statistics
    *(f"{x} float32 by {y} all" for x, y in product(SCHEDULES, (1, 3))),
    *(f"{x} {y} by 3 default" for x, y in product(SCHEDULES, ("compact", "float16"))),
    *("resident compact by 1 all", "resident float16 by 1 all"),
)

SPARSITIES: Final[Options] = {"sparsities": (0.5, 0.6)}
TARGETS: Final[Options] = {**SPARSITIES, "patterns": ("2:4", "4:8")}
NORMED, SOLVERS = ("gradient", "gblm", "gradient-ria"), ("sparsegpt", "alps")
METHODS: Final = ("magnitude", "wanda", "fisher", "ria", *NORMED, *SOLVERS)
GROUPS: Final = ("input", "layer", "global", "output:5", "input:12")
ALLOCATIONS: Final = ("owl", "dlp", "sensitivity")
RECIPE: Final = "method=alps curvature=kfac allocation=sensitivity"
FEW: Final = (RECIPE, "method=gblm allocation=owl", "method=wanda group=global")
CASES: Final = (  # of pruning, with all their targets in one pass
    *(f"method={x} grad_norm={y}" for x, y in product(NORMED, ("l2", "sum"))),
    *(f"method={x} group={y}" for x, y in product(("magnitude", "wanda", "gblm"), GROUPS)),
    *(f"method={x} allocation={y}" for x, y in product(("wanda", "gblm", *SOLVERS), ALLOCATIONS)),
    *("group=global update=obs", "allocation=owl group=layer", "method=alps group=output"),
    *("allocation=dlp allocation_score=magnitude", "allocation=owl allocation_score=W**2*G1*a"),
    *("method=wanda update=obs", "method=wanda update=lsq", "allocation=dlp update=lsq"),
    *("method=wanda update=lsq curvature=kfac", "method=alps curvature=kfac", RECIPE),
    *("score=abs(W*GS)", "score=abs(W)*X*G2", "score=abs(W)*G1 update=lsq curvature=kfac"),
    "score=ri(W)*sqrt(X)+log(1+a*G1)/2-(G2-GS)**2*-W+ri(G)",
)


def options_of(case: str) -> Options:
    """The options that a case spells out, and targets; not all options go with patterns."""
    options = dict(part.split("=", 1) for part in case.split())
    targets = TARGETS if options.keys().isdisjoint({"group", "allocation"}) else SPARSITIES
    return {**targets, **options}


OTHER_CASES: Final[dict[str, Options]] = {
    **{f"mixed {x}": {**TARGETS, "allocation": x, "mixed_patterns": True} for x in ALLOCATIONS},
    "mixed recipe": {**options_of(RECIPE), **TARGETS, "mixed_patterns": True},
    "unmixed": {**TARGETS, "allocation": "dlp"},
    "0.5 alone": {"sparsities": (0.5,)},
    "2:4 alone": {"patterns": ("2:4",), "method": "alps"},
    "0, 0.9 and 1:8": {"sparsities": (0.0, 0.9), "patterns": ("1:8",), "method": "wanda"},
    "alpha 1": {**TARGETS, "alpha": 1.0},
    "some layers": {**TARGETS, "include": ("mlp",), "exclude": (r"layers\.1\.",)},
    "head": {**TARGETS, "method": "magnitude", "include": ("lm_head",)},
}


# ---- models and data ----


@torch.no_grad()
def randomise(model: Any, seed: int) -> None:
    """Redraw matrices with heavy tails, shift the rest; every processor gives the same."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.rand(parameter.shape, generator=generator) * 2 - 1
        if parameter.ndim >= 2:
            parameter.copy_(noise * noise * noise * 0.75)
        else:
            parameter.add_(noise * 0.25)


def save_toy(toy: Toy, folder: str) -> None:
    """Write a whole checkpoint."""
    is_vit = toy.kind == "vit"
    name = "AutoModelForImageClassification" if is_vit else "AutoModelForCausalLM"
    config = AutoConfig.for_model(toy.kind, **toy.config)
    model = getattr(transformers, name).from_config(config, dtype=torch.float32)
    randomise(model, toy.seed)
    model.to(toy.dtype).save_pretrained(folder, max_shard_size=toy.max_file)
    size = {"height": 16, "width": 16}
    (ViTImageProcessorPil(size=size) if is_vit else tokenizer()).save_pretrained(folder)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word."""
    ids = {word: i for i, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", *WORDS))}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def write_data(root: Path) -> None:
    """A long document; documents shorter than a window; images of noise in class folders."""
    generator = random.Random(0)
    weights = [1 / i for i in range(1, len(WORDS) + 1)]
    words = generator.choices(WORDS, weights, k=2400)
    (root / "text.txt").write_text(" ".join(words[:1600]))
    rows = (json.dumps({"text": " ".join(words[i : i + 8])}) for i in range(1600, 2400, 8))
    (root / "rows.jsonl").write_text("\n".join(rows))
    for label, number in product(range(3), range(4)):
        folder = root / "images" / f"LABEL_{label}"
        folder.mkdir(parents=True, exist_ok=True)
        width, height = generator.randint(18, 30), generator.randint(18, 30)
        noise = generator.randbytes(3 * width * height)
        Image.frombytes("RGB", (width, height), noise).save(folder / f"{number}.png")


# ---- one collection, one pruning ----


def digest(parts: Iterable[tuple[str, bytes]]) -> str:
    """xxh3-128 over keys and the digests of their contents, whatever order they come in."""
    lines = sorted(f"{key} {xxhash.xxh3_128_hexdigest(data)}\n" for key, data in parts)
    assert lines
    return xxhash.xxh3_128_hexdigest("".join(lines).encode())


def chunks(store: Path) -> Iterator[tuple[str, bytes]]:
    """The data of all arrays as they lie on disk."""
    for file in (*store.glob("layers/**/c/**/*"), *store.glob("calibration/**/c/**/*")):
        if file.is_file():
            yield file.relative_to(store).as_posix(), file.read_bytes()


def attributes(store: Path) -> Iterator[tuple[str, bytes]]:
    """The attributes of each statistic, in one spelling."""
    for file in store.glob("layers/*/*/zarr.json"):
        document = json.loads(file.read_bytes())["attributes"]
        yield file.relative_to(store).as_posix(), json.dumps(document, sort_keys=True).encode()


def norms(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Each statistic of each layer, decoded."""
    store = gradpipe.open_store(folder)
    for layer, statistic in product(store.spec.layers, store.spec.statistics):
        yield f"{layer.name}/{statistic}", store.read_norms(layer, statistic).tobytes()


@dataclass(frozen=True, slots=True)
class Workplace:
    """A folder with models, data and stores, and the table that grows from them."""

    root: Path
    entries: Digests = field(default_factory=dict)

    def model(self, name: str) -> str:
        """Where a toy lies."""
        return str(self.root / "models" / name)

    def store(self, name: str) -> Path:
        """Where a collection lies."""
        return self.root / "stores" / name

    def config(self, name: str, model: str, **options: Any) -> gradpipe.CollectConfig:
        """A small collection."""
        usual: Options = {"data": "text.txt", "seq_len": 16}
        settings = {
            **({"data": "images"} if model == "vit" else usual),
            "num_samples": 7,
            **options,
        }
        return gradpipe.CollectConfig(
            model=self.model(model),
            store=self.store(name),
            data=gradpipe.DataConfig(name=str(self.root / settings.pop("data"))),
            device="cpu",
            **settings,
        )

    def collect(self, name: str, model: str, **options: Any) -> None:
        """Collect in one go, and enter the store."""
        gradpipe.collect(self.config(name, model, **options))
        self.enter_store(name)

    def enter_store(self, name: str) -> None:
        """The entries of a finished store."""
        for kind, parts in (("data", chunks), ("attributes", attributes), ("norms", norms)):
            self.entries[f"collect/{name}/{kind}"] = digest(parts(self.store(name)))

    def prune(self, name: str, model: str, store: str, **options: Any) -> None:
        """Prune, and enter each target's folder once it is there."""
        out = self.root / "pruned" / name.replace("/", ":")
        paths: Options = {"model": self.model(model), "store": str(self.store(store)), "out": out}
        gradpipe.prune(gradpipe.PruneConfig(**paths, device="cpu", **options))
        for folder in sorted({file.parent for file in out.rglob("*.safetensors")}):
            files = ((x.name, x.read_bytes()) for x in folder.glob("*.safetensors"))
            target = "out" if folder == out else folder.name
            self.entries[f"prune/{name}/{target}"] = digest(files)


# ---- everything ----


def collect_all(work: Workplace) -> None:
    """Every model in every way."""
    for model, way in product(TOYS, WAYS):
        schedule, encoding, _, batch, kind = way.split()
        options: Options = {"schedule": schedule, "encoding": encoding, "batch_size": int(batch)}
        chosen = {"statistics": ALL} if kind == "all" else {}
        work.collect(f"{model} {way}", model, **options, **chosen)


def collect_specials(work: Workplace) -> None:
    """Data, layers and snapshots that are not the usual ones."""
    work.collect("llama joined", "llama", data="rows.jsonl", seed=3)
    work.collect("llama activations", "llama", statistics=("act_l2", "act_sum", "hessian"))
    work.collect("llama in bfloat16", "llama", dtype="bfloat16")
    work.collect("llama with head", "llama", include=("lm_head",), statistics=ALL)
    for schedule in SCHEDULES:
        options: Options = {"schedule": schedule, "statistics": ALL}
        every = {"checkpoint_every": 2} if schedule == "resident" else {}  # each block is saved
        work.collect(f"llama {schedule} with snapshots", "llama", **every, **options)
        options |= {"num_samples": 1, "seq_len": 2}  # some experts see nothing
        work.collect(f"qwen3_moe {schedule} unseen", "qwen3_moe", **options)


def collect_shards(work: Workplace, model: str, schedule: str) -> None:
    """Two jobs and a merge, in one store and in two."""
    options: Options = {"schedule": schedule, "statistics": ALL}
    one, two, rest = (f"{model} {schedule} {x}" for x in ("shards", "shards in two stores", "rest"))
    for name, index in ((one, 0), (one, 1), (two, 1), (rest, 0)):
        shard = gradpipe.Shard(index, 2)
        gradpipe.collect_shard(work.config(name, model, shard=shard, **options))
    for stores in ([one], [two, rest]):
        gradpipe.merge([work.store(name) for name in stores])
        work.enter_store(stores[0])


def prune_all(work: Workplace) -> None:
    """Every method on every model, on two from each encoding; cases on one model, few on all."""
    for model, encoding, method in product(TOYS, ("compact", "float32", "float16"), METHODS):
        if encoding == "compact" or model in {"llama", "gpt2"}:
            name, store = f"{model} {encoding} {method}", f"{model} resident {encoding} by 1 all"
            work.prune(name, model, store, **options_of(f"method={method}"))
    cases = {**{case: options_of(case) for case in CASES}, **OTHER_CASES}
    for model, case in product(TOYS, cases):
        if model == "llama" or case in FEW:
            store = f"{model} resident compact by 1 all"
            work.prune(f"{model} {case}", model, store, **cases[case])


def prune_specials(work: Workplace) -> None:
    """Prunings that need a store or a file of their own."""
    for case in (*FEW, "method=sparsegpt allocation=owl"):
        store = "qwen3_moe resident unseen"
        work.prune(f"qwen3_moe unseen {case}", "qwen3_moe", store, **options_of(case))
    store, rising = "llama resident float32 by 1 all", work.root / "rising.json"
    names = [layer.name for layer in gradpipe.open_store(work.store(store)).spec.layers]
    rising.write_text(json.dumps({name: 0.3 + 0.03 * i for i, name in enumerate(names)}))
    for name, targets in (("as it is", {}), ("moved", TARGETS)):
        work.prune(f"llama file {name}", "llama", store, allocation=str(rising), **targets)
    work.prune("llama of other weights", "other", store, allow_mismatch=True, **TARGETS)
    both = ("layers", "lm_head")
    work.prune("llama with head", "llama", "llama with head", include=both, **TARGETS)
    for shard in (gradpipe.Shard(0, 2), gradpipe.Shard(1, 2)):
        work.prune("llama shards", "llama", store, shard=shard, **options_of(RECIPE))


def table() -> Digests:
    """All entries, computed anew."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as root:
        work = Workplace(Path(root))
        for name, toy in {**TOYS, "other": Toy("llama", _LLAMA, seed=1)}.items():
            save_toy(toy, work.model(name))
        write_data(work.root)
        collect_all(work)
        collect_specials(work)
        for model, schedule in product(("llama", "qwen3_moe", "vit"), SCHEDULES):
            collect_shards(work, model, schedule)
        prune_all(work)
        prune_specials(work)
    return work.entries


# ---- the command ----


def machine() -> Digests:
    """What floating-point results may depend on."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text() if info.is_file() else "")
    kernels = {
        "cpu": found[1] if found else "?",
        "kernels": torch.backends.cpu.get_cpu_capability(),
    }
    return {**kernels, **{name: version(name) for name in PACKAGES}}


def differences(expected: Digests, found: Digests) -> list[str]:
    """A line for each entry that is not the same in both."""
    pairs = ((key, expected.get(key), found.get(key)) for key in {**expected, **found})
    return [f"{key}: expected {old}, got {new}" for key, old, new in pairs if old != new]


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Digests of what gradpipe computes.")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--write", type=Path, metavar="FILE", help="write the table")
    either.add_argument("--check", type=Path, metavar="FILE", help="print what differs from it")
    options = parser.parse_args()
    expected = json.loads(options.check.read_bytes()) if options.check else None
    found = {"machine": machine(), "entries": table()}
    if expected is None:
        write = options.write.write_text if options.write else sys.stdout.write
        write(json.dumps(found, indent=1) + "\n")
        return 0
    for line in differences(expected["machine"], found["machine"]):
        print(f"note: float results may differ here: {line}")
    lines = differences(expected["entries"], found["entries"])
    print(*lines, f"{len(lines)} of {len(found['entries'])} entries differ", sep="\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
