"""Allocations: exact means, their laws, and the sources they come from."""

import json
import math
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradpipe import InputError, collect, open_store, prune
from gradpipe.stages.checkpoint.folder import Checkpoint
from gradpipe.stages.prune.allocation_rules import dlp, dlp_alpha, owl, rounded, shifted
from gradpipe.stages.prune.thresholds import Thresholds
from tests.support.cases import collecting, pruning, written
from tests.support.reference import (
    reference_dlp,
    reference_mask,
    reference_owl,
    reference_score,
)

_SIZES = st.dictionaries(st.integers(0, 30), st.integers(1, 10**9), min_size=1, max_size=12)


def mean(values: dict[Any, float], sizes: dict[Any, int]) -> float:
    """Weighted by size."""
    return math.fsum(values[k] * sizes[k] for k in sizes) / sum(sizes.values())


@given(_SIZES, st.floats(0, 1), st.data())
@settings(deadline=None)
def test_a_wish_is_moved_to_its_target(
    sizes: dict[int, int], sparsity: float, data: st.DataObject
) -> None:
    """The weighted mean is the target to 1e-6, nothing leaves [0, 1], the order stays."""
    wish = {k: data.draw(st.floats(-2, 2)) for k in sizes}
    got = shifted(wish, sizes, sparsity)
    assert mean(got, sizes) == pytest.approx(sparsity, abs=1e-6)
    assert all(0 <= x <= 1 for x in got.values())
    order = sorted(sizes, key=wish.__getitem__)
    assert all(got[a] <= got[b] for a, b in pairwise(order))


@given(_SIZES, st.floats(0, 1), st.data())
@settings(deadline=None)
def test_rounding_loses_less_than_a_step(
    sizes: dict[int, int], sparsity: float, data: st.DataObject
) -> None:
    """Whole steps, never beyond the count, and within one step of it."""
    steps = {k: data.draw(st.integers(1, max(sizes[k] // 3, 1))) for k in sizes}
    wish = shifted({k: data.draw(st.floats(0, 1)) for k in sizes}, sizes, sparsity)
    count = int(sparsity * sum(sizes.values()))
    got = rounded(wish, sizes, steps, count)
    assert all(got[k] % steps[k] == 0 and 0 <= got[k] <= sizes[k] for k in sizes)
    assert all(abs(got[k] - wish[k] * sizes[k]) <= steps[k] * (1 + 1e-6) for k in sizes)
    if set(steps.values()) == {1}:
        assert sum(got.values()) == pytest.approx(count, abs=1)


@pytest.mark.parametrize("rule", [owl, dlp])
def test_equal_blocks_share_alike(rule: Any) -> None:
    """Equal outliers, or medians, are uniform, not a division by zero; zeros too."""
    sizes = {"a": 10, "b": 30}
    for value in (0.3, 0.0):
        got = rule(dict.fromkeys(sizes, value), sizes, 0.6)
        assert got == pytest.approx({"a": 0.6, "b": 0.6})


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7])
def test_owl_and_dlp_are_their_papers(sparsity: float) -> None:
    """Against each one's definition, on scores with outliers; DLP's α is its scripts'."""
    generator = torch.Generator().manual_seed(0)
    scores = {
        name: torch.rand(size, generator=generator) ** power
        for name, size, power in (("a", 900, 9), ("b", 1500, 4), ("c", 600, 6))
    }
    sizes = {name: len(x) for name, x in scores.items()}
    outliers = {k: float((x > 5 * x.double().mean()).double().mean()) for k, x in scores.items()}
    assert owl(outliers, sizes, sparsity) == pytest.approx(
        reference_owl(scores, sparsity), abs=1e-9
    )
    medians = {k: sorted(x.tolist())[(len(x) - 1) // 2] for k, x in scores.items()}
    assert dlp(medians, sizes, sparsity) == pytest.approx(reference_dlp(scores, sparsity), abs=1e-9)


def test_dlp_spreads_little_where_little_is_pruned() -> None:
    """α rises from 50 % to 70 % without a jump, and stays where no script gives one."""
    alphas = [dlp_alpha(x / 1000) for x in range(1000)]
    assert alphas == sorted(alphas)
    assert max(b - a for a, b in pairwise(alphas)) < 0.001
    assert (alphas[0], alphas[-1]) == (0.04, 0.15)


def test_owl_at_an_extreme_is_clipped_and_moved_again() -> None:
    """What the reference forgets: after clipping, the mean is still the target."""
    sizes = {0: 1000, 1: 10}
    got = owl({0: 0.0, 1: 1.0}, sizes, 0.99)
    assert mean(got, sizes) == pytest.approx(0.99, abs=1e-9)
    assert max(got.values()) <= 1


_FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([0.0, -0.0, 1.0])
)


@given(
    st.dictionaries(st.integers(0, 5), st.lists(_FLOATS, min_size=1, max_size=30), min_size=1),
    st.data(),
)
@settings(deadline=None)
def test_ranks_are_those_of_a_sort(parts: dict[int, list[float]], data: st.DataObject) -> None:
    """Values and counts of any rank, ties to the earlier part."""
    everything = sorted((x + 0.0, k) for k, values in parts.items() for x in values)
    order = {k: i for i, k in enumerate(parts)}
    everything.sort(key=lambda pair: (pair[0], order[pair[1]]))
    rank = data.draw(st.integers(0, len(everything) - 1))
    ranks = Thresholds(lambda: ((k, torch.tensor(x)) for k, x in parts.items()), [0, rank])
    assert ranks.values[1] == everything[rank][0]
    counts: dict[int, int] = defaultdict(int)
    for _, k in everything[: rank + 1]:
        counts[k] += 1
    assert ranks.upto()[1] == {k: counts[k] for k in parts}


# --- through `prune`


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its store, norms exact."""
    root = written(tmp_path_factory.mktemp("allocate"))
    collect(collecting(root, statistics=("grad_l1", "grad_l2", "act_l2", "hessian")))
    return root


def run(root: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Prune, and the report."""
    prune(pruning(root, out, **options))
    report: dict[str, Any] = json.loads((out / "pruning.json").read_text())
    return report


def layers_of(root: Path) -> dict[str, tuple[str, Tensor, dict[str, Tensor]]]:
    """Block, weight and sums of each layer."""
    checkpoint, store = Checkpoint.open(str(root / "model")), open_store(root / "store")
    found = {}
    for x in store.spec.layers:
        norms = {s: torch.from_numpy(store.read_norms(x, s)) for s in ("grad_l2", "act_l2")}
        sums = {s: value.double().square() for s, value in norms.items()}
        found[x.name] = (str(x.block), checkpoint.read(x.weight_key), sums)
    return found


def by_block(root: Path, method: str) -> dict[str, Tensor]:
    """All scores of each block."""
    scores: dict[str, list[Tensor]] = defaultdict(list)
    for block, weight, sums in layers_of(root).values():
        scores[block].append(reference_score(method, weight, sums, 4).flatten())
    return {block: torch.cat(parts) for block, parts in scores.items()}


@pytest.mark.parametrize(
    ("method", "group"),
    [(m, g) for m in ("wanda", "gblm") for g in (None, "layer", "input:8")] + [("sparsegpt", None)],
)
@pytest.mark.parametrize("allocation", ["owl", "dlp", "sensitivity"])
def test_every_allocation_meets_the_target(
    root: Path, tmp_path: Path, method: str, allocation: str, group: str | None
) -> None:
    """Requested and achieved, weighted by size, whatever it is combined with."""
    report = run(
        root, tmp_path / "out", method=method, allocation=allocation, group=group, sparsities=(0.6,)
    )
    layers = report["layers"].values()
    total = sum(x["size"] for x in layers)
    step = 1 if group == "layer" or method == "sparsegpt" else 56
    assert 0 <= 0.6 * total - sum(x["zeros"] for x in layers) <= step
    assert len({x["requested"] for x in layers}) > 1


def test_owl_and_dlp_see_whole_blocks(root: Path, tmp_path: Path) -> None:
    """The shares of `prune` are those of the definition on each block's scores."""
    for allocation, reference in (("owl", reference_owl), ("dlp", reference_dlp)):
        report = run(
            root, tmp_path / allocation, method="wanda", allocation=allocation, group="layer"
        )
        expected = reference(by_block(root, "wanda"), 0.5)
        for name, layer in report["layers"].items():
            block = name.split(".")[2]
            assert layer["requested"] == pytest.approx(expected[block], abs=1 / layer["size"])


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_global_is_one_sort_over_everything(root: Path, tmp_path: Path, method: str) -> None:
    """The mask of all layers' scores sorted together."""
    run(root, tmp_path / "out", method=method, group="global", sparsities=(0.37,))
    pruned = Checkpoint.open(str(tmp_path / "out"))
    layers = layers_of(root)
    scores = {
        name: reference_score(method, weight, sums, 4).float()
        for name, (_, weight, sums) in layers.items()
    }
    flat = torch.cat([score.flatten() for score in scores.values()])
    kept = reference_mask(flat[None], 0.37, "layer")[0]
    start = 0
    for name, score in scores.items():
        expected = kept[start : start + score.numel()].reshape(score.shape)
        assert torch.equal(pruned.read(f"{name}.weight") != 0, expected), name
        start += score.numel()


def test_sensitivity_goes_three_quarters_of_the_way_to_global(root: Path, tmp_path: Path) -> None:
    """By the Fisher score, whatever the method."""
    everywhere = run(root, tmp_path / "global", method="fisher", group="global")
    part = run(root, tmp_path / "part", method="wanda", group="layer", allocation="sensitivity")
    for name, layer in part["layers"].items():
        expected = 0.75 * everywhere["layers"][name]["requested"] + 0.25 * 0.5
        assert layer["requested"] == pytest.approx(expected, abs=1.01 / layer["size"])


def test_mixed_patterns_choose_n_by_block(root: Path, tmp_path: Path) -> None:
    """One n for each block, whose mean is the pattern's; without the flag, nothing is to choose."""
    options: dict[str, Any] = {
        "method": "wanda",
        "allocation": "dlp",
        "allocation_score": "W**2*G2",
        "patterns": ("4:8",),
    }
    mixed = run(root, tmp_path / "mixed", **options, mixed_patterns=True)
    patterns = {name.split(".")[2]: x["pattern"] for name, x in mixed["layers"].items()}
    assert {x["pattern"] for x in mixed["layers"].values()} == set(patterns.values())
    assert sum(int(p.split(":")[0]) for p in patterns.values()) == 4 * len(patterns)
    assert mixed["achieved_sparsity"] == pytest.approx(0.5, abs=1e-6)
    with pytest.raises(InputError, match="--mixed-patterns lets it choose"):
        run(root, tmp_path / "plain", **options)


def test_a_file_of_sparsities_is_moved_to_the_target(root: Path, tmp_path: Path) -> None:
    """By layer name; the differences stay. Without a target, it is the file's own mean."""
    names = [x.name for x in open_store(root / "store").spec.layers]
    wish = {name: 0.2 + 0.3 * (i % 2) for i, name in enumerate(names)}
    path = tmp_path / "wish.json"
    path.write_text(json.dumps(wish))
    options: dict[str, Any] = {"method": "wanda", "group": "layer", "allocation": str(path)}
    report = run(root, tmp_path / "out", **options, sparsities=(0.5,))
    assert report["achieved_sparsity"] == pytest.approx(0.5, abs=1e-4)
    requested = {name: x["requested"] for name, x in report["layers"].items()}
    assert requested[names[1]] - requested[names[0]] == pytest.approx(0.3, abs=1e-2)
    alone = run(root, tmp_path / "alone", **options)
    for name, layer in alone["layers"].items():
        assert layer["achieved"] == pytest.approx(wish[name], abs=2 / layer["size"]), name
    sizes = {name: layer["size"] for name, layer in alone["layers"].items()}
    assert alone["requested_sparsity"] == pytest.approx(mean(wish, sizes), abs=1e-9)
    again = run(root, tmp_path / "again", **options, sparsities=(alone["requested_sparsity"],))
    assert again == alone | {"command": again["command"]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "expected one of uniform"),
        ("[]", "for layer"),
        ("{}", "got None"),
        ('{"model.layers.0.self_attn.q_proj": "x"}', "got x"),
        ('{"model.layers.0.self_attn.q_proj": 1.5}', "got 1.5"),
        ("all", "leaves no weight"),
        ("more", "lm_head is none of the layers that are pruned: take it out"),
        (None, "expected one of uniform"),
    ],
)
def test_a_bad_file_is_one_line(root: Path, tmp_path: Path, content: str | None, said: str) -> None:
    """And nothing is written."""
    path = tmp_path / "wish.json"
    if content in {"all", "more"}:
        names = [x.name for x in open_store(root / "store").spec.layers]
        names += ["lm_head"] * (content == "more")
        path.write_text(json.dumps(dict.fromkeys(names, 1)))
    elif content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=said):
        run(root, tmp_path / "out", method="wanda", allocation=str(path))
    assert not (tmp_path / "out").exists()
