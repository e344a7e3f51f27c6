"""Options: each has one source, a field of a config, and is never ignored without a word."""

import dataclasses
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradpipe
from gradpipe import CollectConfig, DataConfig, EvalConfig, ImportConfig, InputError, PruneConfig
from gradpipe.options import is_given, option_fields, unasked
from gradpipe.pipeline.evaluate_config import EvalExtras
from gradpipe.pipeline.publish import PushConfig
from gradpipe.stages.prune.target import parse_targets
from tests.support.commands import COMMANDS, FLAGS
from tests.support.workplace import COLLECT, EVAL, IMPORT, PRUNE, Refused

CONFIGS: dict[str, tuple[type, ...]] = {  # command -> the configs whose fields it takes
    "collect-grads": (CollectConfig, DataConfig),
    "prune": (PruneConfig, PushConfig),
    "eval": (EvalConfig, DataConfig, EvalExtras, PushConfig),
    "store import-gblm": (ImportConfig,),
}
OF_COMMANDS = {"--dry-run", "--json", "--verbose", "--help", "more"}  # options that no config has
FEWEST: dict[type, dict[str, Any]] = {
    CollectConfig: {"model": "m", "store": Path("s")},
    PruneConfig: {"model": "m", "store": "s", "out": Path("o")},
    EvalConfig: {"model": "m"},
    DataConfig: {},
    EvalExtras: {},
    PushConfig: {},
    ImportConfig: {"model": "m", "store": Path("s"), "l1": Path("l1.pth")},
}


@pytest.mark.parametrize("command", CONFIGS)
def test_each_field_is_one_option_with_its_help_and_default(command: str) -> None:
    """And each option is a field's, or one of the few that belong to the command itself."""
    shown: dict[str, list[Any]] = {}
    for parameter in COMMANDS[command].params:
        shown.setdefault(parameter.opts[0], []).append(parameter)
    expected = set()
    for config in CONFIGS[command]:
        for field in option_fields(config).values():
            is_argument = field.option.is_argument
            [parameter] = shown[field.name if is_argument else field.flag]
            expected.add(parameter.opts[0])
            assert parameter.required == (field.default is dataclasses.MISSING)
            if field.flag != "--dataset":  # each command has a default of its own
                assert parameter.help == field.help
            text = field.option.help.replace("{choices}", "").strip(" .")
            assert text.partition("{")[0].split(",")[0] in parameter.help
    assert set(shown) - expected <= OF_COMMANDS


def test_messages_name_options_that_exist() -> None:
    """An option that is renamed is renamed in what the package says of it."""
    package = Path(gradpipe.__file__).parent
    for path in package.rglob("*.py"):
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", path.read_text()):
            assert flag in FLAGS | {"--version"}, f"{path}: {flag}"


def test_help_says_every_default() -> None:
    """In the same words wherever the value comes from: a field, another option, the model."""
    collect, prune = (COMMANDS[name].params for name in ("collect-grads", "prune"))
    said = {x.opts[0]: x.help for x in (*collect, *prune)}
    for flag, default in (
        ("--num-samples", "128"),
        ("--statistics", "grad_l1,grad_l2,act_l2"),
        ("--seq-len", "2048, or the model's maximum"),
        ("--seed", "0"),
        ("--alpha", "100.0"),
        ("--group", "output; alps: layer"),
    ):
        assert said[flag].endswith(f"[default: {default}]")
    dataset = {x.opts[0]: x.help for x in COMMANDS["eval"].params}["--dataset"]
    assert dataset.endswith("[default: wikitext2]")


def test_help_shows_what_a_value_looks_like() -> None:
    """In words of the command line, never as Python has the type; a flag takes no value."""
    shown = {
        (name, x.opts[0]): x.metavar
        for name in CONFIGS
        for x in COMMANDS[name].params
        if x.opts[0] not in OF_COMMANDS
    }
    assert set(shown.values()) - {None} == {
        *("MODEL", "STORE", "OUT"),
        *("TEXT", "INTEGER", "FLOAT", "PATH", "REGEX", "N:M", "I/N", "OWNER/NAME"),
    }
    for flag, metavar in (
        ("--statistics", "TEXT"),
        ("--include", "REGEX"),
        ("--num-samples", "INTEGER"),
        ("--seq-len", "INTEGER"),
        ("--scratch", "PATH"),
        ("--overwrite", None),
    ):
        assert shown["collect-grads", flag] == metavar
    for flag, metavar in (("--sparsity", "FLOAT"), ("--pattern", "N:M"), ("--shard", "I/N")):
        assert shown["prune", flag] == metavar


@pytest.mark.parametrize("value", ["gblm", 3, 0.5, ("a", "b")])
def test_a_default_is_the_value_itself_but_was_not_given(value: object) -> None:
    """It compares, prints, hashes and travels to other processes as what it holds."""
    marked = unasked(value)
    assert (marked, repr(marked), hash(marked)) == (value, repr(value), hash(value))
    assert type(pickle.loads(pickle.dumps(marked))) is type(marked)  # noqa: S301 (its own)


def test_what_is_not_given_stays_so_in_a_changed_copy() -> None:
    """`dataclasses.replace` passes all fields on; only what it changes is asked for."""
    config = PruneConfig(**FEWEST[PruneConfig])
    assert not is_given(config, "alpha")
    changed = dataclasses.replace(config, method="wanda")
    assert is_given(changed, "method")
    assert not is_given(changed, "alpha")
    with pytest.raises(InputError, match=r"--alpha 100.0: wanda has none"):
        dataclasses.replace(changed, alpha=100.0)


# ---- what would be ignored ----


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "sparsegpt", "group": "layer"}, "--group layer: .*128 columns"),
        ({"method": "sparsegpt", "update": "obs"}, "by itself"),
        ({"method": "alps", "update": "none"}, "--update none: alps updates weights by itself"),
        ({"method": "alps", "score": "abs(W)"}, "has no score"),
        ({"method": "gblm", "score": "abs(W)"}, "leave out --method gblm"),
        ({"method": "wanda", "alpha": 100.0}, "--alpha 100.0: wanda has none"),
        ({"method": "alps", "alpha": 100.0}, "--alpha 100.0: alps has none"),
        ({"score": "abs(W)*X", "alpha": 100.0}, "has none"),
        ({"method": "wanda", "grad_norm": "l1"}, "--grad-norm l1: wanda does not use it"),
        ({"method": "sparsegpt", "grad_norm": "l1"}, "does not use it"),
        ({"score": "abs(W)*G2", "grad_norm": "l1"}, "does not use it"),
        ({"curvature": "kfac"}, "only --update lsq and alps"),
        ({"curvature": "input"}, "--curvature input: only --update lsq and alps"),
        ({"method": "sparsegpt", "curvature": "input"}, "only --update lsq and alps"),
        ({"update": "obs", "curvature": "input"}, "only --update lsq and alps"),
        ({"method": "alps", "group": "global"}, "leave --allocation out"),
        ({"group": "global", "allocation": "owl"}, "leave --allocation out"),
        ({"group": "global", "allocation": "uniform"}, "leave --allocation out"),
        ({"allocation": "owl", "patterns": ("2:4",)}, "--allocation owl: .*--mixed-patterns"),
        ({"allocation": "uniform", "patterns": ("2:4",)}, "--allocation uniform: n:m is the same"),
        ({"allocation_score": "wanda"}, "uses none"),
        ({"allocation": "owl", "allocation_score": "alps"}, "no score of its own"),
        ({"mixed_patterns": True}, "needs a --pattern"),
        ({"mixed_patterns": True, "patterns": ("2:4",)}, "needs a --pattern and an --allocation"),
        ({"group": "output", "patterns": ("2:4",)}, "--group output: an n:m pattern"),
        ({"group": "layer", "patterns": ("2:4",), "sparsities": (0.5,)}, "--group layer: an n:m"),
        ({"recipe": "best", "group": "global"}, "--recipe best: the other options leave nothing"),
        (
            {"recipe": "best", "method": "wanda", "allocation": "uniform"},
            "--recipe best: the other options leave nothing",
        ),
        (
            {"recipe": "best", "method": "sparsegpt", "patterns": ("2:4",)},
            "--recipe best: the other options leave nothing",
        ),
        ({"update": "sgd"}, "expected one of none, obs, lsq"),
        ({"curvature": "flat"}, "expected one of input, kfac"),
        ({"score": "abs(V)"}, "'V' is not understood"),
    ],
    ids=str,
)
def test_prune_refuses_what_it_would_ignore(options: dict[str, Any], said: str) -> None:
    """Be it the default that is given: before anything is read."""
    with pytest.raises(InputError, match=said):
        PruneConfig(**FEWEST[PruneConfig], **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"schedule": "resident", "scratch": Path("x")}, "--scratch x: the resident schedule"),
        ({"schedule": "streamed", "checkpoint_every": 4}, "--checkpoint-every 4: the streamed"),
        ({"finalize": True}, "--finalize: without --shard"),
        ({"data": DataConfig(name="ids.npy"), "seed": 0}, "--seed 0: a file of tokens"),
        ({"recipe": "best", "statistics": ("act_l2",)}, "--recipe best: .*leave out the one"),
    ],
    ids=str,
)
def test_collect_refuses_what_it_would_ignore(options: dict[str, Any], said: str) -> None:
    """Before anything is read."""
    with pytest.raises(InputError, match=said):
        CollectConfig(**FEWEST[CollectConfig], **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "c4", "text_column": "text"}, "--text-column text: only tables have columns"),
        ({"name": "ids.npy", "text_column": "text"}, "--text-column text: only tables"),
        ({"name": "notes.txt", "text_column": "body"}, "--text-column body: only tables"),
        ({"name": "stdlib", "config": "en"}, "--dataset-config en: only data sets of the Hub"),
        ({"name": "c4", "split": "train"}, "--split train: only data sets of the Hub"),
        ({"name": "c4", "revision": "main"}, "--revision main: only data sets of the Hub"),
    ],
    ids=str,
)
def test_data_refuse_what_they_would_ignore(options: dict[str, Any], said: str) -> None:
    """The same in both stages and in evaluation."""
    with pytest.raises(InputError, match=said):
        DataConfig(**options)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (f"{PRUNE} --score 'abs(W)' --method gblm", ("leave out --method gblm",)),
        (f"{PRUNE} --alpha 100 --method wanda", ("--alpha 100.0", "wanda has none")),
        (f"{PRUNE} --grad-norm l1 --method wanda", ("--grad-norm l1", "does not use it")),
        (f"{COLLECT} --finalize", ("--finalize", "without --shard")),
        (f"{COLLECT} --text-column text", ("--text-column text", "only tables")),
        (f"{EVAL} --text-column text", ("--text-column text", "only tables")),
        (
            COLLECT.replace("text.txt", "texts") + " --text-column text",
            ("no table", "leave it out"),
        ),
    ],
)
def test_the_command_knows_a_default_from_nothing(
    refused: Refused, workplace: Path, command: str, says: tuple[str, ...]
) -> None:
    """An option that was typed is not the same as one that was left out."""
    (workplace / "texts").mkdir(exist_ok=True)
    (workplace / "texts" / "a.txt").write_text("the fox")
    refused(command, says=says)


# ---- recipes ----


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, ("alps", "kfac", "sensitivity")),
        ({"allocation": "owl"}, ("alps", "kfac", "owl")),
        ({"allocation": "uniform"}, ("alps", "kfac", "uniform")),
        ({"method": "sparsegpt"}, ("sparsegpt", "input", "sensitivity")),
        ({"curvature": "input"}, ("alps", "input", "sensitivity")),
        ({"group": "output"}, ("alps", "kfac", "sensitivity")),
        ({"score": "abs(W)*X"}, ("gblm", "input", "sensitivity")),
        ({"update": "obs"}, ("gblm", "input", "sensitivity")),
        ({"update": "lsq", "method": "fisher"}, ("fisher", "kfac", "sensitivity")),
        ({"score": "abs(W)", "update": "lsq"}, ("gblm", "kfac", "sensitivity")),
        ({"group": "global", "method": "fisher", "update": "lsq"}, ("fisher", "kfac", "uniform")),
        ({"patterns": ("2:4",)}, ("alps", "kfac", "uniform")),
        ({"patterns": ("2:4",), "mixed_patterns": True}, ("alps", "kfac", "sensitivity")),
    ],
    ids=str,
)
def test_what_is_chosen_beside_a_recipe_comes_first(
    chosen: dict[str, Any], expected: tuple[str, str, str]
) -> None:
    """And what of the recipe makes no sense beside it goes: every such command is understood."""
    config = PruneConfig(**FEWEST[PruneConfig], recipe="best", **chosen)
    assert (config.method, config.curvature, config.allocation) == expected


def test_a_recipe_leaves_nothing_behind_in_a_changed_copy() -> None:
    """What it stood for was not given: without it the defaults are back."""
    config = PruneConfig(**FEWEST[PruneConfig], recipe="best")
    again = dataclasses.replace(config, recipe=None)
    assert again == PruneConfig(**FEWEST[PruneConfig])


def test_a_recipe_stands_for_statistics_in_stage_one() -> None:
    """By the same name, from Python as from the command line."""
    config = CollectConfig(**FEWEST[CollectConfig], recipe="best")
    assert {"grad_l2", "hessian", "grad_cov"} <= set(config.statistics)


# ---- how much is imported ----

_WATCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused}:
            raise AssertionError(name + " is imported")
sys.meta_path.insert(0, Refuse())
from gradpipe.__main__ import main
main()
"""
TORCH = {"torch", "transformers", "datasets"}
HEAVY = TORCH | {"zarr", "numpy", "numcodecs", "pyarrow", "fsspec", "huggingface_hub"}
HELP = HEAVY | {"pydantic"}


@pytest.mark.parametrize(
    ("command", "code", "refused"),
    [
        ("--help", 0, HELP),
        ("--version", 0, HELP),
        ("prune --help", 0, HELP),
        ("collect-grads --help", 0, HELP),
        ("store import-gblm --help", 0, HELP),
        (f"{PRUNE} --method gblmm", 2, HEAVY),
        (f"{PRUNE} --alpha 100 --method wanda", 2, HEAVY),
        (f"{PRUNE} --no-such-option", 2, HEAVY),
        (f"{COLLECT} --encoding int8", 2, HEAVY),
        (IMPORT, 2, HEAVY),
        ("prune empty store new", 2, HEAVY),
        ("eval empty", 2, HEAVY),
        ("prune model no-store new", 2, TORCH),
        ("store info store", 0, TORCH),
        ("store info no-store", 2, TORCH),
        ("store verify store", 0, TORCH),
    ],
)
def test_nothing_is_imported_that_an_answer_does_not_need(
    workplace: Path, command: str, code: int, refused: set[str]
) -> None:
    """Help and refusals come at once; torch is imported when options, model and store are right."""
    done = subprocess.run(
        [sys.executable, "-c", _WATCH.replace("{refused}", repr(refused)), *shlex.split(command)],
        cwd=workplace,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_a_path_may_be_given_as_text_and_text_as_a_path(tmp_path: Path) -> None:
    """From Python: a config has what its field is declared as."""
    text: Any = {"store": "s9", "scratch": str(tmp_path)}
    collected = CollectConfig(model="embedded", **text)
    assert (collected.store, collected.scratch) == (Path("s9"), tmp_path)
    paths: Any = {"model": tmp_path / "model", "store": tmp_path}
    pruned = PruneConfig(**paths, out=Path("out"))
    assert (pruned.model, pruned.store) == (str(tmp_path / "model"), str(tmp_path))


def test_values_may_be_given_as_a_list_or_one_alone_and_as_numpys_numbers() -> None:
    """From Python: `include="mlp"` is one pattern, not three of a letter."""
    given: Any = {"include": "mlp", "exclude": ["up", "down"], "sparsities": np.array([0.5, 1 / 3])}
    config = PruneConfig(**FEWEST[PruneConfig], **given)
    assert (config.include, config.exclude) == (("mlp",), ("up", "down"))
    labels = [target.label for target in parse_targets(config.sparsities, config.patterns)]
    assert labels == ["s0.50", "s0.3333333333333333"]
    for alpha in (np.float32(10), 10):
        one: Any = {"sparsities": 0, "alpha": alpha}
        config = PruneConfig(**FEWEST[PruneConfig], **one)
        assert (config.sparsities, repr(config.sparsities[0]), repr(config.alpha)) == (
            (0.0,),
            "0.0",  # as the command line has them: files tell ints from floats
            "10.0",
        )


@pytest.mark.parametrize(
    ("field", "given", "meant"),
    [
        ("num_samples", np.int64(4), 4),
        ("model", Path("m"), "m"),
        ("store", "s", Path("s")),
        ("device", torch.device("cpu"), "cpu"),
    ],
)
def test_a_field_gets_what_was_meant(field: str, given: object, meant: object) -> None:
    """NumPy's numbers, paths and text, what has the name of a value."""
    config = CollectConfig(**{**FEWEST[CollectConfig], field: given})
    got = getattr(config, field)
    assert (got, type(got)) == (meant, type(meant))


@pytest.mark.parametrize(
    ("field", "given", "says"),
    [
        ("num_samples", "4", "--num-samples '4': expected int"),
        ("num_samples", None, "--num-samples None: expected int"),
        ("seq_len", 16.0, "--seq-len 16.0: expected int"),
        ("shard", (0, 2), r"--shard \(0, 2\): expected Shard"),
        ("include", [["a"]], r"--include \['a'\]: expected str"),
        ("overwrite", "no", "--overwrite 'no': expected bool"),
        ("data", "wikitext2", "data 'wikitext2': expected a DataConfig"),
        ("model", torch.nn.Sequential(torch.nn.Linear(1, 1)), r"--model Sequential\( .*: expected"),
    ],
)
def test_another_type_is_the_users_mistake(field: str, given: object, says: str) -> None:
    """Named at once, in one line."""
    with pytest.raises(InputError, match=says) as refusal:
        CollectConfig(**{**FEWEST[CollectConfig], field: given})
    assert "\n" not in str(refusal.value)
