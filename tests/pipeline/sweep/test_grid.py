"""The grid: what is crossed, what is left out, what is refused; and the published ones."""

from pathlib import Path
from typing import Any

import pytest

from gradpipe import InputError, PruneConfig, SweepConfig
from gradpipe.pipeline.studies import STUDIES
from gradpipe.pipeline.sweep.grid import Grid
from gradpipe.stages.prune.allocation import find_rule
from gradpipe.stages.prune.methods import CURVATURES, METHODS, UPDATES, find_score


def sweeping(**changes: Any) -> SweepConfig:
    """A config of paths that nobody reads."""
    return SweepConfig(model="model", store="store", out=Path("out"), **changes)


def points(**changes: Any) -> list[PruneConfig]:
    """The prunings of a grid."""
    return [point.config for point in Grid.of(sweeping(**changes)).points]


def test_nothing_given_is_what_prune_does() -> None:
    """One point, with the defaults of `pipe prune`."""
    [config] = points()
    assert (config.method, config.sparsities, config.patterns) == ("gblm", (), ())


def test_all_that_is_given_twice_is_crossed() -> None:
    """Rows by columns by every other axis, each combination once, in the order given."""
    found = points(
        methods=("gradient", "gblm"),
        sparsities=(0.5, 0.6),
        grad_norms=("l2", "l1"),
        groups=("layer",),
    )
    assert [(x.method, x.sparsities, x.grad_norm, x.group) for x in found] == [
        (method, (sparsity,), norm, "layer")
        for method in ("gradient", "gblm")
        for norm in ("l2", "l1")
        for sparsity in (0.5, 0.6)
    ]


def test_methods_formulas_and_recipes_are_rows_of_one_axis() -> None:
    """A recipe beside methods is one more, and changes none of them."""
    found = points(methods=("wanda",), scores=("abs(W)*G1",), recipes=("best",))
    assert [(x.method, x.score, x.recipe, x.allocation) for x in found] == [
        ("wanda", None, None, "uniform"),
        ("gblm", "abs(W)*G1", None, "uniform"),
        ("alps", None, "best", "sensitivity"),
    ]


def test_what_makes_no_sense_is_left_out_and_said() -> None:
    """Wanda has no α and a pattern no group: one point each, whatever the others have."""
    grid = Grid.of(
        sweeping(
            methods=("wanda", "gblm", "sparsegpt"),
            alphas=(1.0, 0.0, "auto"),
            groups=("layer", "output"),
            sparsities=(0.5,),
            patterns=("2:4",),
        )
    )
    found = [(x.config.method, x.config.patterns, x.config.group) for x in grid.points]
    assert len(found) == 2 + 1 + 6 + 3 + 1 + 1
    assert found.count(("wanda", ("2:4",), None)) == 1
    assert found.count(("gblm", (), "layer")) == 3
    assert [x.chooses_alpha for x in grid.points].count(True) == 3
    assert set(grid.left_out) == {
        "--alpha of wanda",
        "--alpha of sparsegpt",
        "--group of sparsegpt",
        "--group of 2:4",
    }


def test_options_that_exclude_each_other_are_two_points() -> None:
    """One threshold for all layers leaves an allocation nothing to say."""
    found = points(groups=("global", "output"), allocations=("uniform", "owl"), sparsities=(0.5,))
    assert [(x.group, x.allocation) for x in found] == [
        ("global", "uniform"),
        ("output", "uniform"),
        ("output", "owl"),
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"methods": ("wanda",), "alphas": (1.0, 10.0)}, "--alpha 1.0: wanda has none"),
        ({"groups": ("layer", "rows")}, "group 'rows': expected output"),
        ({"patterns": ("2-4",)}, "pattern '2-4'"),
        ({"allocations": ("owls", "owl"), "sparsities": (0.5,)}, "--allocation owls"),
        ({"curvature": "kfac", "methods": ("gblm", "wanda")}, "--curvature kfac"),
        ({"scores": ("abs(W",)}, "--score 'abs\\(W'"),
    ],
)
def test_an_option_that_no_point_takes_is_refused(options: dict[str, Any], says: str) -> None:
    """In the words of `pipe prune`."""
    with pytest.raises(InputError, match=says):
        Grid.of(sweeping(**options))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"methods": ("gblmm",)}, "--method gblmm: expected one of"),
        ({"alphas": (-1.0,)}, "--alpha -1.0: expected a finite number"),
        ({"alphas": (1.0, 1.0)}, "1.0 is given twice"),
        ({"study": "main", "methods": ("wanda",)}, "--method wanda: --study main sets the grid"),
        ({"study": "mains"}, "--study mains: expected one of"),
        ({"study": "samples"}, "--with-store"),
        ({"alpha_dataset": "c4"}, "only --alpha auto reads it"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], says: str) -> None:
    """Before any file is looked at."""
    with pytest.raises(InputError, match=says):
        sweeping(**options)


def _reads(config: PruneConfig) -> set[str]:
    """What a pruning reads of a store, by the tables alone."""
    method, rule = METHODS[config.method], find_rule(config.allocation)
    assert rule is not None
    names = [config.score or config.method] if method.formula else []
    names += [config.allocation_score or rule.score or ""] if rule.num_passes else []
    found = {
        x for name in names for x in find_score(name, config.grad_norm, config.alpha).statistics
    }
    if method.curvatures or UPDATES[config.update].curvatures:
        found |= set(CURVATURES[config.curvature])
    return found | set(method.reads)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_says_what_it_reads(name: str) -> None:
    """The statistics of its points, all and no others; every option of its grids has a say."""
    stores = ("other",) if STUDIES[name].needs_stores else ()
    found = points(study=name, with_stores=stores)
    assert set(STUDIES[name].statistics) == set[str]().union(*map(_reads, found))


def test_the_tables_are_the_paper_s() -> None:
    """As many points as each table of GBLM-Pruner has rows and columns, by its own count."""
    counts = {
        name: len(points(study=name, with_stores=("b",) if x.needs_stores else ()))
        for name, x in STUDIES.items()
    }
    assert counts == counts | {
        "groups": 5,
        "main": 3 * 5,
        "alpha": 9,
        "metrics": 24,
        "obs": 3 * 2,
        "vit": 4 * 5,
    }
    formulas = [x.score for x in points(study="metrics")]
    assert formulas[:6] == [
        *("abs(W)*abs(GS)", "abs(W)*G1", "abs(W)*G2"),
        *("abs(W)*X*abs(GS)", "abs(W)*X*G1", "abs(W)*X*G2"),
    ]
    assert {"abs(W)*X-a*abs(W)*G1", "(abs(W)*X)**2+a*W*GS", "(abs(W)*X)**2-a*W*G2"} <= {*formulas}
