"""Help by topic with examples, completion, did-you-mean, and what a pruning prints."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from gradpipe.errors import did_you_mean
from gradpipe.help import EXAMPLES, OTHER, TOPICS, topic_of
from gradpipe.pipeline.reports.kinds import block_of, is_alike, kind_of, summary
from gradpipe.pipeline.reports.results import LayerResult, Zeros
from tests.support.commands import COMMANDS, ROOT
from tests.support.workplace import COLLECT, EVAL, PIPE, PRUNE, Pipe, Refused


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_ends_with_examples_that_it_understands(name: str) -> None:
    """Word for word, on a line of its own each; and every option stands under a topic."""
    command = COMMANDS[name]
    context = command.make_context(name, [], resilient_parsing=True)
    context.info_name = name.rsplit(maxsplit=1)[-1]
    context.parent = _parents(name.split()[:-1])
    shown = re.sub(r"\x1b\[\d+m", "", command.get_help(context))
    assert EXAMPLES[name]
    assert shown.endswith("".join(f"\n  $ {example}" for example in EXAMPLES[name]))
    for example in EXAMPLES[name]:
        words = shlex.split(example)
        assert words[1 : 1 + len(name.split())] == name.split()
        command.make_context(name, words[1 + len(name.split()) :])
    for parameter in command.params:
        flag = parameter.opts[0]
        if flag.startswith("--") and flag != "--help":
            assert topic_of(flag.removeprefix("--")) != OTHER
            assert f"{topic_of(flag.removeprefix('--'))}:\n" in shown


def _parents(words: list[str]) -> Any:
    """The contexts above a command's, as click makes them: the program's first."""
    context = typer.Context(ROOT, info_name="pipe")
    for word in words:
        context = typer.Context(ROOT.commands[word], info_name=word, parent=context)
    return context


def test_a_topic_holds_no_option_twice() -> None:
    """Where an option stands does not depend on the table's order."""
    flags = [flag for some in TOPICS.values() for flag in some]
    assert len(set(flags)) == len(flags)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("pipe pr", {"prune"}),
        ("pipe prune a b c --method gr", {"gradient", "gradient-ria"}),
        ("pipe prune a b c --grad", {"--grad-norm"}),
        ("pipe collect-grads a b --encoding flo", {"float32", "float16"}),
    ],
)
def test_a_shell_completes_commands_options_and_what_they_may_be(
    typed: str, offered: set[str]
) -> None:
    """As bash asks, of the installed command."""
    asked = {
        "_PIPE_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": f"{typed.count(' ')}",
    }
    done = subprocess.run(
        [PIPE], env=os.environ | asked, capture_output=True, text=True, check=False
    )
    assert (set(done.stdout.split()), done.stderr) == (offered, "")


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        (f"{PRUNE} --method wnada", "wanda"),
        (f"{PRUNE} --score fihser", "fisher"),
        (f"{PRUNE} --score 'abs(W)*sqr(X)'", "sqrt"),
        (f"{PRUNE} --allocation unifrom", "uniform"),
        (f"{PRUNE} --allocation owl --allocation-score wnada", "wanda"),
        (f"{PRUNE} --group outptu", "output"),
        (f"{PRUNE} --include up_porj", "up_proj"),
        (f"{PRUNE} --exclude mlp.down_prjo", "mlp.down_proj"),
        (f"{PRUNE} --update osb", "obs"),
        (f"{PRUNE} --device cdua", "cuda"),
        (PRUNE.replace("model", "embeded"), "embedded"),
        (f"{COLLECT} --statistics grad_11", "grad_l1"),
        (f"{COLLECT} --encoding flaot16", "float16"),
        (f"{COLLECT} --schedule streamd", "streamed"),
        (f"{COLLECT} --include lm_haed", "lm_head"),
        (f"{COLLECT} --blocks model.layer", "model.layers"),
        (f"{EVAL} --dtype bfolat16", "bfloat16"),
        (EVAL.replace("text.txt", "wikitxt2"), "wikitext2"),
    ],
)
def test_a_name_that_is_mistyped_is_answered_with_the_nearest(
    refused: Refused, command: str, meant: str
) -> None:
    """Of every kind of name that a user types."""
    assert refused(command).endswith(f": did you mean {meant}?\n")


def test_what_is_like_nothing_is_answered_with_nothing() -> None:
    """A guess that is far off is worse than none."""
    assert did_you_mean("zzz", ("wanda", "gblm")) == ""
    assert did_you_mean("gbml", ("wanda", "gblm")) == ": did you mean gblm?"


@pytest.mark.parametrize(("typed", "meant"), [("prun", "prune"), ("prune --spasity 1", "sparsity")])
def test_commands_and_options_have_neighbours_too(typed: str, meant: str) -> None:
    """On stderr, with exit code 2."""
    done = subprocess.run(
        [PIPE, *typed.split()], capture_output=True, text=True, check=False, stdin=None
    )
    assert done.returncode == 2
    assert meant in done.stderr.splitlines()[-1]


# ---- what a pruning prints ----


def test_a_pruning_prints_a_line_a_kind_of_layer(pipe: Pipe) -> None:
    """Not one for each layer, unless that is asked for; and says where those are."""
    pipe(COLLECT.replace("new", "store"))
    out = pipe("prune model store out --sparsity 0.5 --pattern 2:4")
    assert len(re.findall("q_proj", out)) == 1
    assert re.search(r"self_attn\.q_proj +│ +2 │ 0\.5000 │ 0\.5000 │", out)
    assert out.splitlines()[-1].startswith("each layer: --verbose, or pruning.json; ")
    out = pipe("prune model store verbose --sparsity 0.5 --verbose")
    assert "model.layers.1.self_attn.q_proj" in out


def test_a_pruning_prints_a_line_a_block_where_blocks_differ(pipe: Pipe) -> None:
    """As an allocation makes them."""
    pipe(COLLECT.replace("new", "store"))
    out = pipe("prune model store out --sparsity 0.7 --allocation owl")
    assert re.findall(r"model\.layers\.\S+", out) == ["model.layers.0", "model.layers.1"]
    assert Path("out/pruning.json").exists()


def _layer(name: str, zeros: int, requested: float = 0.5) -> LayerResult:
    return LayerResult(name=name, requested=requested, zeros=zeros, size=10)


def test_blocks_come_in_the_order_of_their_numbers() -> None:
    """Of names alone; what is outside the blocks stands for itself."""
    layers = [_layer(f"h.{i}.mlp.fc", i) for i in (10, 2)] + [_layer("lm_head", 5)]
    lines = summary(layers, by_kind=False)
    assert [(name, len(of), Zeros.sum(of).zeros) for name, of in lines.items()] == [
        ("h.2", 1, 2),
        ("h.10", 1, 10),
        ("lm_head", 1, 5),
    ]
    assert list(summary(layers, by_kind=True)) == ["mlp.fc", "lm_head"]
    assert (block_of("a.3.x.5.w1"), kind_of("a.3.x.5.w1")) == ("a.3", "x.*.w1")
    assert is_alike(layers)
    assert not is_alike([*layers, _layer("h.3.mlp.fc", 3, requested=0.6)])
