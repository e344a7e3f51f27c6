"""Train a tiny Llama on text that every machine has: Python's own standard library.

This is the recipe of the embedded model, and the way to make others (another size, another seed,
other text) without a download:

    python scripts/train_tiny_model.py OUT                        # the embedded model's recipe
    python scripts/train_tiny_model.py OUT --text FOLDER --hidden 64 --steps 500

One core, one thread, so that the same seed gives the same model; progress goes to stderr, the
finished directory's path to stdout.

Shapes: S tokens of a text, W windows, B sequences of a batch, T tokens of a sequence.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gradpipe.errors import InputError
from gradpipe.stages.data.stdlib import DOCUMENT_SEPARATOR, stdlib_documents

SPECIAL_TOKENS: Final = ("<s>", "</s>")
SMALLEST_VOCAB: Final = 256 + len(SPECIAL_TOKENS)
HELDOUT_ONE_IN: Final = 20
PEAK_LEARNING_RATE: Final = 4e-3
FINAL_SHARE: Final = 0.1
WARMUP_STEPS: Final = 50
WEIGHT_DECAY: Final = 0.1
CLIP_NORM: Final = 1.0
REPORTS: Final = 12
REPORT_WINDOWS: Final = 64
EVAL_BATCH: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """The shape of the model; the defaults are the embedded model's."""

    hidden: int = 128
    blocks: int = 4
    heads: int = 2
    kv_heads: int = 1
    intermediate: int = 352
    vocab: int = 4096

    def __post_init__(self) -> None:
        """Check what transformers would accept, or refuse without naming the option."""
        if self.hidden % (2 * self.heads):
            raise InputError(
                f"--hidden {self.hidden} must be a multiple of twice --heads ({self.heads})"
            )
        if self.heads % self.kv_heads:
            raise InputError(
                f"--heads {self.heads} must be a multiple of --kv-heads {self.kv_heads}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How long to train, on what batches; the defaults are the embedded model's."""

    steps: int = 3073
    seed: int = 0
    seq_len: int = 256
    batch_size: int = 16
    max_minutes: float | None = None  # None: all the steps, however long they take


@dataclass(frozen=True, slots=True)
class Corpus:
    """The texts of both halves."""

    train: list[str]
    heldout: list[str]


def stdlib_corpus() -> Corpus:
    """Return the running Python's standard library, split as the embedded model's was."""
    return Corpus(
        [text for _, text in stdlib_documents("train")],
        [text for _, text in stdlib_documents("heldout")],
    )


def folder_corpus(folder: Path) -> Corpus:
    """Return the UTF-8 files below a folder; about one in twenty is held out, by its name."""
    corpus = Corpus([], [])
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        half = corpus.heldout if is_heldout(path.relative_to(folder)) else corpus.train
        try:
            half.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    if not corpus.train or not corpus.heldout:
        raise InputError(
            f"--text {folder}: {len(corpus.train)} UTF-8 files to train on and "
            f"{len(corpus.heldout)} held out, both must be at least 1; split the text into more "
            f"files (about one in {HELDOUT_ONE_IN} is held out, chosen by its name)"
        )
    return corpus


def write_texts(folder: Path, corpus: Corpus) -> None:
    """Write both halves as JSON Lines, to calibrate on the one and evaluate on the other."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in (("train", corpus.train), ("heldout", corpus.heldout)):
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def is_heldout(relative: Path) -> bool:
    """Tell by the hash of its name whether a file is held out: stable as files come and go."""
    digest = hashlib.sha256(relative.as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """Train a byte-level BPE, file by file: a merge never spans two files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str], seq_len: int) -> Tensor:
    """Return the tokens of the joined texts, int64 (S,): at least one window and a token."""
    ids_S = torch.tensor(tokenizer.encode(DOCUMENT_SEPARATOR.join(texts)).ids, dtype=torch.int64)
    if len(ids_S) <= seq_len:
        raise InputError(
            f"{len(ids_S)} tokens are too few for --seq-len {seq_len}: shorten it, or add text"
        )
    return ids_S


def windows(ids_S: Tensor, seq_len: int) -> Tensor:
    """Cut a stream into non-overlapping windows (W, T), the incomplete last one dropped."""
    count = len(ids_S) // seq_len
    return ids_S[: count * seq_len].view(count, seq_len)


def batches(ids_S: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """Yield batches (B, T) of windows that start anywhere, for ever."""
    generator = torch.Generator().manual_seed(recipe.seed)
    offsets_T = torch.arange(recipe.seq_len)
    while True:
        shape = (recipe.batch_size, 1)
        starts_B1 = torch.randint(len(ids_S) - recipe.seq_len + 1, shape, generator=generator)
        yield ids_S[starts_B1 + offsets_T]


def build_model(size: ModelSize, recipe: Recipe) -> LlamaForCausalLM:
    """Return a freshly initialised model."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=4 * recipe.seq_len,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def build_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """Return AdamW that decays the matrices and leaves the norms alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95))


def learning_rate(step: int, steps: int) -> float:
    """Return the rate of a step: linear warm-up, then linear decay to a tenth of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (steps - WARMUP_STEPS)
    return PEAK_LEARNING_RATE * (1 - (1 - FINAL_SHARE) * progress)


def train_step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, ids_BT: Tensor, rate: float
) -> None:
    """Take one optimiser step on a batch."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = model(input_ids=ids_BT, labels=ids_BT).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, windows_WT: Tensor) -> float:
    """Return exp of the mean token loss over the windows."""
    losses = [
        float(model(input_ids=ids_BT, labels=ids_BT).loss) * len(ids_BT)
        for ids_BT in torch.split(windows_WT, EVAL_BATCH)
    ]
    return math.exp(sum(losses) / len(windows_WT))


def train(model: LlamaForCausalLM, ids_S: Tensor, heldout_WT: Tensor, recipe: Recipe) -> None:
    """Train in place, with a line on stderr about a dozen times on the way."""
    optimizer = build_optimizer(model)
    start = time.monotonic()
    interval = max(1, recipe.steps // REPORTS)
    for step, ids_BT in zip(range(recipe.steps), batches(ids_S, recipe), strict=False):
        minutes = (time.monotonic() - start) / 60
        if recipe.max_minutes is not None and minutes >= recipe.max_minutes:
            report(f"stopped by --max-minutes after {step} of {recipe.steps} steps")
            return
        if step % interval == 0:
            heldout = perplexity(model, heldout_WT[:REPORT_WINDOWS])
            report(f"step {step}: held-out perplexity {heldout:.2f}, {minutes:.1f} min")
        train_step(model, optimizer, ids_BT, learning_rate(step, recipe.steps))


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write a directory that `from_pretrained` opens: beside its place, then renamed into it."""
    partial = out.with_name(out.name + ".partial")
    model.save_pretrained(partial)
    bos, eos = SPECIAL_TOKENS
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    wrapped.save_pretrained(partial)
    partial.rename(out)


def report(line: str) -> None:
    """Say something to whoever waits."""
    typer.echo(line, err=True)


def run(
    out: Path, text: Path | None, save_text: Path | None, size: ModelSize, recipe: Recipe
) -> None:
    """Read, tokenise, train, measure and save."""
    if out.exists():
        raise InputError(f"{out} exists already: give a new path, or remove it first")
    torch.set_num_threads(1)  # sums in one order: the same bits whatever the number of cores
    corpus = stdlib_corpus() if text is None else folder_corpus(text)
    if save_text is not None:
        write_texts(save_text, corpus)
    tokenizer = train_tokenizer(corpus.train, size.vocab)
    ids_S = token_stream(tokenizer, corpus.train, recipe.seq_len)
    heldout_WT = windows(token_stream(tokenizer, corpus.heldout, recipe.seq_len), recipe.seq_len)
    model = build_model(size, recipe)
    count = sum(p.numel() for p in model.parameters())
    report(f"{count:,} parameters, {len(ids_S):,} training tokens, {heldout_WT.numel():,} held out")
    train(model, ids_S, heldout_WT, recipe)
    heldout = perplexity(model, heldout_WT)
    report(f"held-out perplexity {heldout:.2f} ({len(heldout_WT)} windows of {recipe.seq_len})")
    save(model, tokenizer, out)


SIZE: Final = ModelSize()
RECIPE: Final = Recipe()


def main(  # noqa: PLR0913, PLR0917 - one parameter per option
    out: Annotated[Path, typer.Argument(help="The directory to write; it must not exist.")],
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="A folder of text files, instead of the library."
        ),
    ] = None,
    save_text: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="A folder to write train.jsonl and heldout.jsonl to."),
    ] = None,
    hidden: Annotated[int, typer.Option(min=2)] = SIZE.hidden,
    blocks: Annotated[int, typer.Option(min=1)] = SIZE.blocks,
    heads: Annotated[int, typer.Option(min=1)] = SIZE.heads,
    kv_heads: Annotated[int, typer.Option(min=1)] = SIZE.kv_heads,
    intermediate: Annotated[int, typer.Option(min=1)] = SIZE.intermediate,
    vocab: Annotated[int, typer.Option(min=SMALLEST_VOCAB)] = SIZE.vocab,
    steps: Annotated[int, typer.Option(min=1)] = RECIPE.steps,
    seed: Annotated[int, typer.Option(help="Of the weights and of the batches.")] = RECIPE.seed,
    seq_len: Annotated[int, typer.Option(min=2)] = RECIPE.seq_len,
    batch_size: Annotated[int, typer.Option(min=1)] = RECIPE.batch_size,
    max_minutes: Annotated[
        float | None,
        typer.Option(min=0.0, help="Stop early, wherever the schedule is, and save."),
    ] = RECIPE.max_minutes,
) -> None:
    """Train a tiny Llama on Python's standard library; write a Hugging Face directory."""
    try:
        size = ModelSize(
            hidden=hidden,
            blocks=blocks,
            heads=heads,
            kv_heads=kv_heads,
            intermediate=intermediate,
            vocab=vocab,
        )
        recipe = Recipe(
            steps=steps,
            seed=seed,
            seq_len=seq_len,
            batch_size=batch_size,
            max_minutes=max_minutes,
        )
        run(out, text, save_text, size, recipe)
    except InputError as error:
        report(f"error: {error}")
        raise typer.Exit(2) from error
    typer.echo(out)


if __name__ == "__main__":
    typer.run(main)
