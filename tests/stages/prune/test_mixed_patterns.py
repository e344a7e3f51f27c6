"""n:m with an n for each block: whole numbers that meet the target, or a line that says not."""

import io
import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from gradpipe import collect, open_store, prune
from gradpipe.stages.prune.allocation_rules import shifted, whole_parts
from gradpipe.stages.prune.target import Pattern
from tests.support.cases import collecting, pruning, written


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose first block is dense, three quarters the size of its mixtures of experts."""
    root = written(
        tmp_path_factory.mktemp("uneven"), "qwen3_moe", mlp_only_layers=[0], num_hidden_layers=3
    )
    collect(collecting(root, num_samples=8, seq_len=24, statistics=("grad_l2", "act_l2")))
    return root


@given(
    st.dictionaries(st.integers(0, 9), st.integers(1, 40), min_size=1, max_size=5),
    st.sampled_from([Pattern(2, 4), Pattern(4, 8), Pattern(1, 4), Pattern(3, 4)]),
    st.data(),
)
@settings(deadline=None)
def test_whole_parts_come_as_near_as_any(
    sizes: dict[int, int], pattern: Pattern, data: st.DataObject
) -> None:
    """Of all whole numbers within one of the rounded wish, by trying every combination."""
    m, most = pattern.m, 1 - 1 / pattern.m
    wish = {k: data.draw(st.floats(0, 1)) for k in sizes}
    shares = shifted(wish, sizes, float(pattern.sparsity), most)
    goal = (m - pattern.n) * sum(sizes.values())
    got = whole_parts(shares, sizes, m, goal)

    def miss(parts: Iterable[int]) -> int:
        return abs(sum(x * size for x, size in zip(parts, sizes.values(), strict=True)) - goal)

    floors = [math.floor(x * m + 1e-9) for x in shares.values()]
    choices = [[x for x in range(near - 1, near + 3) if 0 <= x < m] for near in floors]
    assert miss(got.values()) <= min(miss(parts) for parts in itertools.product(*choices))
    assert all(0 <= x < m for x in got.values())
    assert all(abs(got[k] - shares[k] * m) <= 2 for k in sizes)


def test_many_blocks_of_many_sizes_take_no_time() -> None:
    """Where every block's size is its own, the best are kept, and they meet the target closely."""
    sizes = {i: 1_000_003 + 7919 * i for i in range(100)}
    shares = shifted({i: math.sin(i) / 10 for i in sizes}, sizes, 0.5, 0.75)
    total = sum(sizes.values())
    parts = whole_parts(shares, sizes, 4, 2 * total)
    assert sum(parts[i] * sizes[i] for i in sizes) / 4 == pytest.approx(total / 2, rel=1e-4)


def mixed(root: Path, out: Path, allocation: str, pattern: str) -> tuple[dict[str, Any], str]:
    """The report of one run, and what was said."""
    said = io.StringIO()
    options = {"allocation": allocation, "patterns": (pattern,), "mixed_patterns": True}
    [result] = prune(pruning(root, out, method="wanda", **options), Console(file=said, width=200))
    report = json.loads((out / "pruning.json").read_text())
    assert result.requested == report["requested_sparsity"]
    return report, said.getvalue()


def _without_routers(notes: list[str]) -> list[str]:
    """Less the line that says which gates stay dense."""
    return [note for note in notes if not note.startswith("stays dense")]


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
@pytest.mark.parametrize("allocation", ["owl", "dlp", "sensitivity"])
def test_mixed_patterns_of_unequal_blocks_meet_the_target(
    uneven: Path, tmp_path: Path, allocation: str, pattern: str
) -> None:
    """One n for each block, and as many weights gone as the pattern itself takes."""
    report, _ = mixed(uneven, tmp_path / "out", allocation, pattern)
    n, m = map(int, pattern.split(":"))
    assert report["requested_sparsity"] == report["achieved_sparsity"] == 1 - n / m
    assert _without_routers(report["notes"]) == []
    patterns = {name.split(".")[2]: x["pattern"] for name, x in report["layers"].items()}
    assert {x["pattern"] for x in report["layers"].values()} == set(patterns.values())


def test_a_target_that_cannot_be_met_is_said_and_recorded(uneven: Path, tmp_path: Path) -> None:
    """A small block that must lose nearly all: what is asked for is still the pattern's."""
    names = [x.name for x in open_store(uneven / "store").spec.layers]
    wish = tmp_path / "wish.json"
    wish.write_text(json.dumps({name: 1.0 if ".0." in name[:15] else 0.3 for name in names}))
    report, said = mixed(uneven, tmp_path / "out", str(wish), "4:8")
    assert report["requested_sparsity"] == 0.5
    assert report["achieved_sparsity"] == pytest.approx(0.5 + 1 / 88, abs=1e-12)
    note = "4:8 mixed by block prunes 51.14% of the weights, not 50.00%: "
    assert _without_routers(report["notes"]) == [note + "the blocks' sizes do not add up to it"]
    assert report["notes"][0] in said.splitlines()
