"""`pipe eval` of several models on one text, beside the dense one, by tasks and by the clock."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoConfig, AutoModelForCausalLM

from gradpipe import DataConfig, EvalConfig, InputError, evaluate
from gradpipe.pipeline.compare import compare
from gradpipe.pipeline.evaluate_config import EvalExtras
from gradpipe.pipeline.reports.results import Metrics
from gradpipe.stages.evaluate.latency import measure_speed
from gradpipe.stages.evaluate.tasks import Tasks
from tests.support.architectures import save_architecture
from tests.support.models import save_tiny
from tests.support.workplace import Pipe, Refused, edit_weights

TASK = Path(__file__).parents[1] / "data" / "task"
SEQ_LEN = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, one near it, and tokens."""
    root = tmp_path_factory.mktemp("compare")
    save_tiny("llama", root / "dense")
    shutil.copytree(root / "dense", root / "near")
    edit_weights(root / "near", lambda x: x["model.layers.1.mlp.up_proj.weight"][:, ::2].zero_())
    np.save(root / "tokens.npy", np.random.default_rng(0).integers(3, 90, 5 * SEQ_LEN))
    return root


def evaluating(folder: Path, **changes: Any) -> EvalConfig:
    """An evaluation of `near` on the tokens."""
    config = EvalConfig(
        model=str(folder / "near"),
        data=DataConfig(name=str(folder / "tokens.npy")),
        seq_len=SEQ_LEN,
        batch_size=2,
    )
    return replace(config, **changes)


def logits(model: Path, windows: torch.Tensor) -> torch.Tensor:
    """Of each window by transformers alone, (windows, tokens, vocabulary), in float64."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        found: torch.Tensor = loaded(input_ids=windows).logits
    return found.double()


def test_the_comparison_is_that_of_the_formulas(folder: Path) -> None:
    """KL divergence, agreement, and the difference's error, computed at once from all logits."""
    extras = EvalExtras(compare=str(folder / "dense"))
    [found] = compare([str(folder / "near")], evaluating(folder), extras)
    windows = torch.from_numpy(np.load(folder / "tokens.npy")).view(-1, SEQ_LEN)
    ours, dense = (logits(folder / name, windows)[:, :-1] for name in ("near", "dense"))
    kl = kl_div(ours.log_softmax(-1), dense.log_softmax(-1), reduction="none", log_target=True)
    assert found.comparison is not None
    assert found.comparison.kl_divergence == pytest.approx(float(kl.sum(-1).mean()), rel=1e-4)
    same = (ours.argmax(-1) == dense.argmax(-1)).double().mean()
    assert found.comparison.top_token_agreement == pytest.approx(float(same))
    assert 0 < found.comparison.top_token_agreement < 1
    losses = [
        cross_entropy(x.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
        .view(len(windows), -1)
        .mean(1)
        for x in (ours, dense)
    ]
    perplexities = [math.exp(x.mean()) for x in losses]
    moves = perplexities[0] * losses[0] - perplexities[1] * losses[1]
    error = float(moves.std() / math.sqrt(len(windows)))
    assert found.comparison.difference_error == pytest.approx(error, rel=1e-3)
    assert found.comparison.difference == pytest.approx(perplexities[0] - perplexities[1], rel=1e-3)


def test_a_model_is_itself(folder: Path) -> None:
    """No divergence, one token, no difference, and no error of it."""
    dense = str(folder / "dense")
    [found] = compare([dense], evaluating(folder), EvalExtras(compare=dense))
    assert found.comparison is not None
    assert found.comparison.kl_divergence == 0
    assert found.comparison.top_token_agreement == 1
    assert found.comparison.difference == found.comparison.difference_error == 0


def test_perplexities_are_those_that_each_has_alone(folder: Path) -> None:
    """Several at once, beside another or not: the same numbers, bit for bit."""
    names = [str(folder / name) for name in ("near", "dense")]
    alone = [evaluate(evaluating(folder, model=name)) for name in names]
    together = compare(names, evaluating(folder))
    beside = compare(names, evaluating(folder), EvalExtras(compare=names[1]))
    assert [x.metrics for x in together] == alone
    assert [x.metrics for x in beside] == alone
    assert beside[0].comparison is not None
    assert beside[0].comparison.dense_perplexity == alone[1].perplexity


@pytest.mark.parametrize(
    "family", ["llama", "gemma3_text", "gpt2", "falcon", "mixtral", "llama4_text", "dbrx"]
)
def test_streamed_perplexity_is_the_whole_model_s(
    folder: Path, tmp_path: Path, family: str
) -> None:
    """One block after the other: the same number, bit for bit, and nothing left in scratch.

    Experts run as transformers runs them, fused.
    """
    model = str(save_architecture(family, tmp_path / "model"))
    config = evaluating(folder, model=model)
    extras = EvalExtras(schedule="streamed", scratch=tmp_path / "scratch")
    [found] = compare([model], config, extras)
    assert found.metrics == evaluate(config)
    assert [*(tmp_path / "scratch").iterdir()] == []


def test_streamed_is_of_perplexity_alone(refused: Refused) -> None:
    """What needs a whole model is refused, as scratch is where nothing is kept there."""
    text = "eval model --dataset text.txt --seq-len 16 --max-windows 2"
    refused(f"{text} --schedule streamed --compare model", says=("--compare",))
    refused(f"{text} --schedule streamed --latency", says=("--latency",))
    refused(f"{text} --scratch new", says=("--scratch",))


def test_a_single_window_has_no_error(folder: Path) -> None:
    """One window has no spread."""
    config, dense = evaluating(folder, max_windows=1), str(folder / "dense")
    [found] = compare([str(folder / "near")], config, EvalExtras(compare=dense))
    assert found.comparison is not None
    assert found.comparison.difference_error is None


def test_a_local_task_is_scored_by_its_choices(folder: Path) -> None:
    """Accuracy: the share of questions whose right choice is the likelier text."""
    [found] = compare(
        [str(folder / "near")],
        evaluating(folder),
        EvalExtras(tasks=(f"{TASK}/tiny.yaml",), compare=str(folder / "dense")),
    )
    [score] = found.tasks
    assert (score.task, score.metric, score.num_samples) == ("tiny", "acc", 4)
    assert score.value == right_answers(folder / "near") / 4
    assert score.difference == score.value - right_answers(folder / "dense") / 4
    spread = np.array([1.0] * round(4 * score.value) + [0.0] * round(4 - 4 * score.value))
    assert score.error == pytest.approx(spread.std(ddof=1) / 2)


def right_answers(folder: Path) -> int:
    """How many questions the model gets right, by the sum of its log-probabilities."""
    from transformers import AutoTokenizer  # noqa: PLC0415 (one test reads a tokenizer)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    count = 0
    for line in (TASK / "tiny.jsonl").read_text().splitlines():
        document, sums = json.loads(line), []
        for choice in document["choices"]:
            start = tokenizer(document["start"], add_special_tokens=False).input_ids
            whole = tokenizer(f"{document['start']} {choice}", add_special_tokens=False).input_ids
            found = logits(folder, torch.tensor([whole]))[0].log_softmax(-1)
            steps = range(len(start), len(whole))
            sums.append(sum(float(found[i - 1, whole[i]]) for i in steps))
        count += int(np.argmax(sums)) == document["answer"]
    return count


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("process_docs: !function os.system", "cannot read it"),
        ("include: other.yaml", "`include` would run code"),
        ("use_prompt: '/tmp/prompts.yaml:first'", "`use_prompt` would run code, or read from"),
        ("class: !!python/name:os.system", "cannot read it"),
        ("metric_list: [{metric: /tmp/evil}]", "metric /tmp/evil"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]", "metric acc"),
        ("dataset_path: someone/data", "expected one of json, csv"),
        ("dataset_kwargs: {data_files: {test: ../outside.jsonl}}", "expected one in the file's"),
        ("dataset_kwargs: {data_files: {test: 'http://a/b'}}", "expected one in the file's"),
        ("task: 1", "expected a mapping"),
    ],
)
def test_a_task_file_runs_no_code_and_stays_in_its_folder(
    tmp_path: Path, lines: str, says: str
) -> None:
    """What would import, fetch, or read from elsewhere is refused before a model is loaded."""
    (tmp_path / "outside.jsonl").write_text("{}")
    inner = tmp_path / "inner"
    shutil.copytree(TASK, inner)
    key = lines.partition(":")[0]
    kept = (inner / "tiny.yaml").read_text().partition(f"{key}:")
    text = kept[0] + lines + "\n"
    if key in {"dataset_path", "task"}:
        text = (inner / "tiny.yaml").read_text().replace(f"{key}: json", lines)
        text = text.replace("task: tiny", lines) if key == "task" else text
    (inner / "tiny.yaml").write_text(text)
    with pytest.raises(InputError, match=says):
        Tasks.find([str(inner / "tiny.yaml")])


def test_a_template_cannot_reach_python(folder: Path, tmp_path: Path) -> None:
    """Jinja's way to classes, and from there to everything, ends in its sandbox."""
    inner = shutil.copytree(TASK, tmp_path / "task")
    text = (inner / "tiny.yaml").read_text()
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (inner / "tiny.yaml").write_text(text.replace("{{start}}", reach))
    with pytest.raises(InputError, match="unsafe"):
        compare(
            [str(folder / "near")],
            evaluating(folder),
            EvalExtras(tasks=(str(inner / "tiny.yaml"),)),
        )


def test_time_and_size_are_measured(folder: Path) -> None:
    """Of both models; zeros make the pruned file smaller to zstd, and no smaller on disk."""
    edit = shutil.copytree(folder / "near", folder / "zeros")
    edit_weights(edit, lambda x: [weight.zero_() for weight in x.values() if weight.ndim == 2])
    extras = EvalExtras(latency=True, compare=str(folder / "dense"))
    [found] = compare([str(folder / "zeros")], evaluating(folder), extras)
    for speed in (found.latency, found.dense_latency):
        assert speed is not None
        assert speed.prefill_seconds > 0
        assert speed.decode_seconds > 0
        assert (speed.device, speed.compressed_layers) == ("cpu", 0)
    assert found.latency is not None
    assert found.dense_latency is not None
    assert found.latency.file_bytes == found.dense_latency.file_bytes
    assert found.latency.zstd_bytes < found.dense_latency.zstd_bytes / 2


def test_the_command_prints_each_model_and_what_was_asked(pipe: Pipe) -> None:
    """One model as ever; several each below its path as it was given; all of it as JSON."""
    shutil.copytree("model", "pruned/model")
    edit_weights(Path("pruned/model"), lambda x: x["model.norm.weight"].mul_(2))
    text = "--dataset text.txt --seq-len 16 --max-windows 2"
    assert pipe(f"eval model {text}").count("\n") == 1
    out = pipe(f"eval model pruned/model {text} --compare model --latency --tasks {TASK}/tiny.yaml")
    lines = out.splitlines()
    assert [line for line in lines if line[0] != " "] == ["model", "pruned/model"]
    for words in ("perplexity", "KL divergence from model", "tiny acc", "prefill", "by zstd"):
        assert sum(words in line for line in lines) >= 2, words
    document = json.loads(pipe(f"eval model pruned/model {text} --compare model --json -"))
    first, second = document["models"]
    assert first["compare"]["kl_divergence"] == 0 < second["compare"]["kl_divergence"]
    assert "tasks" not in first
    assert {*first} >= set(Metrics.__slots__)


def test_what_cannot_be_compared_is_refused(refused: Refused) -> None:
    """Another vocabulary, a model that is not there, a task that nobody knows."""
    text = "--dataset text.txt --seq-len 16 --max-windows 2"
    refused(f"eval model nothing {text}", says=("nothing",))
    refused(f"eval model {text} --compare nothing", says=("nothing",))
    refused(f"eval model {text} --tasks none.yaml", says=("none.yaml",))


@pytest.mark.parametrize("kind", ["mamba", "rwkv", "openai-gpt"])
def test_a_token_is_timed_whatever_the_model_keeps(kind: str) -> None:
    """A state under another name than attention's, or nothing: then all is read again."""
    options = {"mamba": {"state_size": 4}, "openai-gpt": {"n_positions": 32}}.get(kind, {})
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, vocab_size=64, **sizes, **options)
    prefill, decode = measure_speed(
        AutoModelForCausalLM.from_config(config).eval(), torch.arange(8)
    )
    assert min(prefill, decode) > 0
