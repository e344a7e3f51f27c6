"""Version 2 of the format: shared inputs, parts of a tensor, couplings; version 1 is read still."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradpipe.errors import StoreError
from gradpipe.store.objects import digest
from gradpipe.store.reader import GradientStore
from gradpipe.store.schema import CouplingSpec, LayerSpec, StoreSpec
from tests.support.stores import toy_layer, toy_spec, write_toy

GOLDEN = Path(__file__).parents[1] / "data" / "store-v2"
GOLDEN_DIGEST = "4a3fc7ded129282615d4c633ed675454"
GOLDEN_NORMS = "ef2e16a034003928c662006c5a6c3f89"

STATISTICS = ("grad_l2", "act_l2", "hessian")
MLP = "model.layers.0.mlp"


def expert(index: int, count: int = 2, **fields: Any) -> LayerSpec:
    """One of the experts that a tensor holds."""
    key = f"{MLP}.experts.down_proj"
    return toy_layer(f"{key}.{index}", (4, 6), weight_key=key, part=(index, count), **fields)


GATE = toy_layer(f"{MLP}.gate_proj", (6, 4))
UP = toy_layer(f"{MLP}.up_proj", (6, 4), input_of=GATE.name)
DOWN = toy_layer(f"{MLP}.down_proj", (4, 6))
LAYERS = (GATE, UP, DOWN, expert(0), expert(1))
COUPLINGS = (
    CouplingSpec(source=GATE.name, target=DOWN.name, outputs=((0, 6),)),
    CouplingSpec(source=UP.name, target=DOWN.name, outputs=((0, 2), (0, 2), (4, 2))),
)


def spec(**fields: Any) -> StoreSpec:
    """A store of a gated block, and of a tensor with two experts."""
    values: dict[str, Any] = {"layers": LAYERS, "version": 2, "couplings": COUPLINGS}
    return toy_spec(**{"statistics": STATISTICS, **values, **fields})


def write_store(folder: Path) -> Path:
    """A finished store of sums over some orders of magnitude."""
    generator = np.random.default_rng(0)
    sums = {}
    for x in LAYERS:
        g = np.exp(generator.normal(-9, 2, x.shape)).astype(np.float32)
        sums[x.name] = {"grad_l2": g * g, "act_l2": g[0]}
        sums[x.name] |= {"hessian": moment(x.shape[1])} if x.input_of is None else {}
    return write_toy(folder, spec(), sums)


def moment(width: int) -> np.ndarray[Any, Any]:
    """The packed triangle of a second moment."""
    rows = np.arange(3 * width, dtype=np.float32).reshape(3, width) % 5
    return np.asarray((rows.T @ rows)[np.triu_indices(width)])


def norms_digest(store: GradientStore) -> str:
    """One digest over every statistic of every layer."""
    norms = [store.read_norms(x, name) for x in store.spec.layers for name in STATISTICS]
    return digest(b"".join(array.tobytes() for array in norms))


def test_every_later_version_reads_the_golden_store() -> None:
    """A finished version-2 store, kept as bytes: its spec and norms come back, to the bit."""
    store = GradientStore.open(GOLDEN)
    store.validate()
    assert store.spec == spec()
    assert (store.digest, norms_digest(store)) == (GOLDEN_DIGEST, GOLDEN_NORMS)


def test_a_store_of_today_has_the_golden_bytes(tmp_path: Path) -> None:
    """What is written from the same sums does not change."""
    assert GradientStore.open(write_store(tmp_path / "store")).digest == GOLDEN_DIGEST


def test_the_example_of_the_format_is_one() -> None:
    """What docs/store-format.md shows of layers and couplings is read as that."""
    page = (GOLDEN.parents[2] / "docs" / "store-format.md").read_text()
    shown = json.loads(page.split("```json\n")[1].split("```")[0])
    for document in shown["layers"]:
        assert LayerSpec.from_json(document).to_json() == {
            **document,
            **{name: document[name] and tuple(document[name]) for name in ("shape", "part")},
        }
    (document,) = shown["couplings"]
    coupling = CouplingSpec.from_json(document)
    value = LayerSpec.from_json(shown["layers"][0])
    coupling.check({value.name: value, coupling.target: toy_layer(coupling.target, (8, 8))})


def version_1(**fields: object) -> dict[str, Any]:
    """A spec as version 1 wrote it."""
    document: dict[str, Any] = json.loads(json.dumps(spec(layers=LAYERS[:3]).to_json()))
    del document["couplings"]
    for x in document["layers"]:
        x["hessian_of"] = x.pop("input_of")
        del x["part"]
    return {**document, "version": 1, **fields}


def test_version_1_is_read() -> None:
    """What it called `hessian_of` is the layer with the same input."""
    assert StoreSpec.from_json(version_1()) == spec(version=1, layers=LAYERS[:3], couplings=())


@pytest.mark.parametrize("field", ["input_of", "part"])
def test_version_1_has_no_field_of_version_2(field: str) -> None:
    """A store that mixes the two is nobody's."""
    document = version_1()
    document["layers"][0][field] = None
    with pytest.raises(StoreError, match=f"unknown fields: {field}"):
        StoreSpec.from_json(document)
    with pytest.raises(StoreError, match="unknown fields: couplings"):
        StoreSpec.from_json(version_1(couplings=[]))
    with pytest.raises(StoreError, match="unknown fields: hessian_of"):
        StoreSpec.from_json({**version_1(), "version": 2})


@pytest.mark.parametrize("part", [(), (0,), (2, 2), (-1, 2), (0, 2, 1)])
def test_a_part_is_one_of_its_number(part: tuple[int, ...]) -> None:
    """(index, count), index below count."""
    with pytest.raises(StoreError, match="impossible part"):
        replace(expert(0), part=part)


def test_a_part_is_named_by_its_tensor_and_index() -> None:
    """So that two parts never have one name, and a part is found by its name."""
    assert expert(3, 4).name == f"{MLP}.experts.down_proj.3"
    with pytest.raises(StoreError, match="of another tensor"):
        replace(expert(0), part=(1, 2))
    with pytest.raises(StoreError, match="of another tensor"):
        replace(expert(0), part=None)


@pytest.mark.parametrize(
    "other", [expert(1, 3), replace(expert(1), shape=(5, 6)), expert(1, transposed=True)]
)
def test_parts_of_a_tensor_are_equal(other: LayerSpec) -> None:
    """One number of parts, one shape, one orientation."""
    with pytest.raises(StoreError, match="equal parts"):
        spec(layers=(*LAYERS[:3], expert(0), other))


@pytest.mark.parametrize(
    "runs",
    [(), ((0, 3),), ((0, 7),), ((1, 6),), ((0, 6), (0, 1)), ((0, 6, 1),), ((0, 0),), ((6, 0),)],
)
def test_runs_of_a_coupling_fit_both_layers(runs: tuple[tuple[int, ...], ...]) -> None:
    """They lie in the source's outputs, and are as many as the target's inputs."""
    coupling = CouplingSpec(source=GATE.name, target=DOWN.name, outputs=runs)
    with pytest.raises(StoreError, match="cannot be the 6 inputs"):
        spec(couplings=(coupling,))


def test_couplings_are_of_the_stores_layers() -> None:
    """A layer that was not collected cannot be coupled."""
    with pytest.raises(StoreError, match="no layers"):
        spec(couplings=(CouplingSpec(source=GATE.name, target="other", outputs=((0, 6),)),))
    with pytest.raises(StoreError, match="cannot share the input of"):
        spec(layers=(GATE, replace(UP, input_of=DOWN.name), replace(DOWN, input_of=GATE.name)))
    with pytest.raises(StoreError, match="cannot share the input of"):
        spec(layers=(GATE, replace(UP, block=1)), couplings=())
