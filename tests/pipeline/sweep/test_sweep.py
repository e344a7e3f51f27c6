"""A sweep: the numbers of `prune` and `evaluate`, a line each, stopped and shared as one likes."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from gradpipe import (
    DataConfig,
    EvalConfig,
    GradpipeError,
    InputError,
    PointResult,
    PruneConfig,
    Shard,
    SweepConfig,
    classify,
    collect,
    evaluate,
    open_store,
    prune,
    sweep,
)
from gradpipe.pipeline.sweep import alpha as choosing
from gradpipe.pipeline.sweep.bench import CHOSEN, Bench
from gradpipe.pipeline.sweep.in_memory import PrunedModel
from tests.support.cases import LLAMA, MECHANISMS, TOKENS, VIT, Case, Shelf, files_of
from tests.support.fused import save_fused


@pytest.fixture
def root(shelf: Shelf) -> Path:
    """A tiny Llama, tokens and a store of every statistic."""
    return shelf.root(LLAMA)


def sweeping(root: Path, out: Path, **changes: Any) -> SweepConfig:
    """Two methods at two targets, measured on a few windows."""
    settings: dict[str, Any] = {
        "model": str(root / "model"),
        "store": str(root / "store"),
        "out": out,
        "methods": ("wanda", "gblm"),
        "sparsities": (0.5,),
        "patterns": ("2:4",),
        "data": DataConfig(name=str(root / "ids.npy")),
        "batch_size": 2,
        "workers": 1,
    }
    return SweepConfig(**{**settings, **changes})


def numbers(results: tuple[PointResult, ...]) -> list[dict[str, Any]]:
    """Lines without what differs from run to run."""
    return [result.to_json() | {"seconds": None} for result in results]


def lines(out: Path) -> list[dict[str, Any]]:
    """What the file holds."""
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def measured(config: SweepConfig, model: Path) -> float:
    """What `pipe eval` says of a checkpoint."""
    evaluation: EvalConfig = replace(config.evaluation, model=str(model))
    if config.data.name.endswith("images"):
        return classify(evaluation).top1
    return evaluate(evaluation).perplexity


def pruned(point: PointResult, config: SweepConfig, out: Path) -> dict[str, Any]:
    """`pruning.json` of the checkpoint that `pipe prune` writes with a line's own options."""
    fields = {"--sparsity": "sparsities", "--pattern": "patterns"}
    given: dict[str, Any] = {}
    for flag, value in point.options.items():
        if flag in fields:
            given[fields[flag]] = (value,)
        elif flag not in {"--num-samples", CHOSEN}:
            given[flag[2:].replace("-", "_")] = tuple(value) if isinstance(value, list) else value
    prune(PruneConfig(model=config.model, store=config.store, out=out, **given))
    report: dict[str, Any] = json.loads((out / "pruning.json").read_text())
    return report


def check(config: SweepConfig, tmp_path: Path) -> None:
    """Each point is what `pipe prune` and `pipe eval` make of it, to the last bit."""
    dense, *points = sweep(config)
    assert dense.point is None
    assert dense.metric.value == measured(config, Path(config.model))
    assert points
    for index, point in enumerate(points):
        out = tmp_path / str(index)
        report = pruned(point, config, out)
        assert point.metric.value == measured(config, out)
        assert point.layers == {name: x["achieved"] for name, x in report["layers"].items()}
        shares = ("achieved_sparsity", "blocks_sparsity", "file_sparsity")
        assert list(point.zeros.values()) == [report[name] for name in shares]
        assert point.point is not None
        assert point.point.method == report["method"]


@pytest.mark.parametrize("case", [*MECHANISMS], ids=str)
def test_numbers_are_those_of_prune_and_eval(case: Case, shelf: Shelf, tmp_path: Path) -> None:
    """Bit for bit, whatever was in memory before: metric, zeros of each layer, of blocks and file.

    Of models whose layers are transposed, fused, experts that make one parameter, or of images.
    """
    root = shelf.root(case)
    config = sweeping(root, tmp_path / "out", data=DataConfig(name=str(root / case.data)))
    before = files_of(root)
    check(
        replace(config, methods=("sparsegpt", "wanda") if case is LLAMA else ("wanda",)), tmp_path
    )
    assert files_of(root) == before


@pytest.mark.parametrize("kind", ["gpt_oss", "dbrx", "qwen3_5_moe_text"])
def test_layers_that_are_parts_of_one_tensor_are_pruned_in_it(kind: str, tmp_path: Path) -> None:
    """Of experts in one tensor some, and then all: the others keep their weights."""
    save_fused(kind, tmp_path / "model")
    np.save(tmp_path / "ids.npy", TOKENS.numpy())
    collect(LLAMA.collecting(tmp_path))
    config = sweeping(tmp_path, tmp_path / "out", methods=("wanda",), patterns=())
    check(config, tmp_path)
    parts = [layer.name for layer in open_store(tmp_path / "store").spec.layers if layer.part]
    some = replace(config, out=tmp_path / "some", include=(rf"{parts[1].replace('.', '[.]')}$",))
    (tmp_path / "again").mkdir()
    check(some, tmp_path / "again")


OPTIONS: list[dict[str, Any]] = [
    {"methods": ("gblm",), "updates": ("obs",), "grad_norms": ("l2",), "alphas": (10.0,)},
    {"methods": ("gblm",), "groups": ("global", "input:8"), "patterns": ()},
    {"methods": ("wanda",), "allocations": ("owl",), "mixed_patterns": True},
    {"methods": (), "scores": ("abs(W)*abs(GS)",), "include": ("mlp",), "patterns": ()},
    {"methods": (), "recipes": ("best",), "dtype": "bfloat16"},
]


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_every_option_means_what_it_does_to_prune(
    root: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """A line's own options, given to `pipe prune`, make the checkpoint that it tells of."""
    check(sweeping(root, tmp_path / "out", **options), tmp_path)


def test_a_stopped_sweep_goes_on(root: Path, tmp_path: Path) -> None:
    """Killed within a point, and within the line of another: the same command, the same lines."""
    config = sweeping(root, tmp_path / "out")
    whole = sweep(replace(config, out=tmp_path / "whole"))
    done = _stopping_after(3)
    with mock.patch.object(PrunedModel, "prune", done), pytest.raises(KeyboardInterrupt):
        sweep(config)
    file = config.out / "results.jsonl"
    first = file.read_bytes()
    assert len(lines(config.out)) == 3
    file.write_bytes(first + b'{"format": 1, "key"')
    with mock.patch.object(Bench, "do", autospec=True, side_effect=Bench.do) as do:
        assert numbers(sweep(config)) == numbers(whole)
    assert do.call_count == 2
    assert file.read_bytes().startswith(first)
    assert len(lines(config.out)) == 5
    with mock.patch.object(Bench, "do", side_effect=AssertionError):
        assert numbers(sweep(config)) == numbers(whole)


def _stopping_after(count: int) -> Any:
    prune_, calls = PrunedModel.prune, []

    def run(self: PrunedModel, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt
        return prune_(self, *arguments)

    return run


def test_shards_share_a_grid(root: Path, tmp_path: Path) -> None:
    """Every point is done by one of them; together they are the sweep, in its order."""
    config = sweeping(root, tmp_path / "out", sparsities=(0.25, 0.5))
    whole = numbers(sweep(replace(config, out=tmp_path / "whole")))
    first = sweep(replace(config, shard=Shard(0, 2)))
    assert numbers(first) == whole[::2]
    assert numbers(sweep(replace(config, shard=Shard(1, 2)))) == whole
    assert len(lines(config.out)) == len(whole) == 7


def test_a_point_is_known_by_what_it_follows_from(root: Path, tmp_path: Path) -> None:
    """Of another model, store, text or window it is another point, and the file takes both."""
    config = sweeping(root, tmp_path / "out", patterns=())
    shutil.copytree(root / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(
        (root / "model" / "config.json").read_text() + " "
    )
    keys = {result.key for result in sweep(config)}
    for changes in ({"max_windows": 2}, {"model": str(tmp_path / "model")}, {"dtype": "bfloat16"}):
        more = {result.key for result in sweep(replace(config, **changes))}
        assert not more & keys
        keys |= more
    assert {line["key"] for line in lines(config.out)} == keys
    moved = shutil.copytree(root / "store", tmp_path / "moved")
    assert {result.key for result in sweep(replace(config, store=str(moved)))} <= keys


def test_other_images_under_the_same_names_are_another_point(shelf: Shelf, tmp_path: Path) -> None:
    """Their number and labels alone tell nothing."""
    root = shelf.root(VIT)
    images = shutil.copytree(root / VIT.data, tmp_path / "images")
    data = DataConfig(name=str(images))
    config = sweeping(root, tmp_path / "out", methods=("wanda",), patterns=(), data=data)
    keys = {result.key for result in sweep(config)}
    one, other, *_ = sorted(images.rglob("*.png"))
    one.write_bytes(other.read_bytes())
    assert not {result.key for result in sweep(config)} & keys


def test_kept_checkpoints_are_prune_s_own(root: Path, tmp_path: Path) -> None:
    """`--keep` writes each point's, also of a sweep that is done; one for each line."""
    config = sweeping(root, tmp_path / "out", methods=("wanda",), patterns=())
    (_, point) = sweep(config)
    assert [path.name for path in config.out.iterdir()] == ["results.jsonl"]
    sweep(replace(config, keep=True))
    [kept] = (config.out / "checkpoints").iterdir()
    pruned(point, config, tmp_path / "pruned")
    assert files_of(kept) == files_of(tmp_path / "pruned")


def test_two_of_one_sweep_keep_a_checkpoint_once(root: Path, tmp_path: Path) -> None:
    """Whoever comes later waits for it, and goes on."""
    config = sweeping(root, tmp_path / "out", methods=("magnitude",), patterns=(), keep=True)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(sweep, [config, config])
    assert first == second
    [kept] = (config.out / "checkpoints").iterdir()
    assert not kept.name.startswith(".")


def test_alpha_is_chosen_on_calibration_text(root: Path, tmp_path: Path) -> None:
    """`--alpha auto` takes the least perplexity on windows that the store has not seen.

    The line says what was tried, and is that of the number chosen.
    """
    text = _longer(root, tmp_path)
    settings: dict[str, Any] = {"methods": ("gblm",), "patterns": (), "alpha_dataset": str(text)}
    config = sweeping(root, tmp_path / "out", alphas=("auto",), **settings)
    (_, auto) = sweep(config)
    how = auto.options[CHOSEN]
    assert auto.point is not None
    assert auto.point.alpha == auto.options["--alpha"]
    assert (how["dataset"], how["windows"]) == ("more.npy", [2, 24])
    assert list(how["perplexity"]) == [f"{alpha:g}" for alpha in choosing.ALPHAS]
    best = min(how["perplexity"], key=how["perplexity"].__getitem__)
    assert float(best) == auto.point.alpha
    fixed = {**settings, "alpha_dataset": None, "alphas": (auto.point.alpha,)}
    (_, same) = sweep(sweeping(root, tmp_path / "out", **fixed))
    assert same.metric == auto.metric
    assert same.layers == auto.layers
    heldout = sweeping(root, tmp_path / "heldout", **fixed, sparsities=(0.5,))
    unseen = replace(heldout, data=DataConfig(name=str(_unseen(text, tmp_path))))
    (_, again) = sweep(unseen)
    assert again.metric.value == how["perplexity"][best]


def _longer(root: Path, tmp_path: Path) -> Path:
    """The store's tokens, and two windows more."""
    ids = np.load(root / "ids.npy")
    np.save(tmp_path / "more.npy", np.concatenate([ids, ids[:2, ::-1]]))
    return tmp_path / "more.npy"


def _unseen(text: Path, tmp_path: Path) -> Path:
    np.save(tmp_path / "unseen.npy", np.load(text)[-2:])
    return tmp_path / "unseen.npy"


def test_a_model_that_is_no_more_is_a_point(root: Path, tmp_path: Path) -> None:
    """Where pruning leaves no loss that is a number, the line says null, and the sweep goes on."""
    config = sweeping(root, tmp_path / "out", methods=("wanda",))
    with mock.patch("gradpipe.pipeline.sweep.measure.perplexity", _failing_second()):
        results = sweep(config)
    assert [result.metric.value is None for result in results] == [False, True, False]
    assert lines(config.out)[1]["metric"]["value"] is None


def _failing_second() -> Any:
    calls: list[int] = []

    def perplexity(*_: Any) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise GradpipeError("the model's loss is nan")
        return 8.0

    return perplexity


def test_stores_are_an_axis(root: Path, tmp_path: Path) -> None:
    """Points of another store are points of their own, told by digest and number of samples."""
    small = tmp_path / "small"
    collect(LLAMA.collecting(root, small, num_samples=2))
    config = sweeping(root, tmp_path / "out", methods=("wanda",), patterns=())
    (_, one, other) = sweep(replace(config, with_stores=(str(small),)))
    assert (one.options["--num-samples"], other.options["--num-samples"]) == (5, 2)
    assert (one.store.name, other.store.name) == ("store", "small")
    assert one.store.digest != other.store.digest


def test_stores_of_other_layers_are_refused(root: Path, tmp_path: Path) -> None:
    """A layer that one point prunes and the next does not would stay pruned."""
    few = tmp_path / "few"
    collect(LLAMA.collecting(root, few, num_samples=2, exclude=("k_proj",)))
    config = sweeping(root, tmp_path / "out", methods=("wanda",), with_stores=(str(few),))
    with pytest.raises(InputError, match="k_proj: expected the same in all"):
        sweep(config)
    assert not config.out.exists()
    assert len(sweep(replace(config, include=("q_proj", "mlp"), patterns=()))) == 3


@pytest.mark.parametrize(
    "text",
    ["no JSON", "[]", '{"format": 2}', '{"format": 1, "key": "k", "options": {}}'],
)
def test_a_line_that_is_no_point_is_refused(root: Path, tmp_path: Path, text: str) -> None:
    """By file and number, before the model is loaded; nothing is cut."""
    (tmp_path / "results.jsonl").write_text(text + "\n")
    with pytest.raises(InputError, match="line 1: "):
        sweep(sweeping(root, tmp_path))
    assert (tmp_path / "results.jsonl").read_text() == text + "\n"
