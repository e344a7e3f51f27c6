"""`pipe report`: what it finds and measures, what it writes, and what it refuses."""

import json
import math
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradpipe import InputError
from gradpipe.pipeline.report import report
from gradpipe.pipeline.report_config import ReportConfig
from gradpipe.pipeline.reports import page
from gradpipe.pipeline.reports.document import Document
from gradpipe.pipeline.reports.facts import Facts, Found, LayerFacts, MaskFact
from gradpipe.pipeline.reports.kinds import block_of
from gradpipe.pipeline.reports.recorded import Recorded
from gradpipe.pipeline.reports.sections import document_of
from gradpipe.store.reader import GradientStore
from tests.support.cases import tensors_of, written
from tests.support.models import save_tiny
from tests.support.reported import HOSTILE, grid, point, write_points
from tests.support.workplace import edit_weights, succeed

KEY = "model.layers.0.self_attn.k_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a store of it, two outputs, and a sweep."""
    root = written(tmp_path_factory.mktemp("reported"))
    write_points(root / "sweep", [point(None, 9.0), *grid()])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        statistics = "grad_l1,grad_sum,act_l2,hessian"
        collect = "collect-grads model store --dataset text.txt --seq-len 16 --num-samples 4"
        succeed(f"{collect} --statistics {statistics}", patch)
        succeed("prune model store out --sparsity 0.5 --pattern 2:4", patch)
        succeed("prune model store owl --allocation owl --sparsity 0.6", patch)
    return root


@pytest.fixture(scope="module")
def everything(place: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of all that there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("everything"))
        return _everything(place)


def _everything(place: Path) -> str:
    return made(place, "owl", "store", "sweep", model=str(place / "model"))


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to write in, with what `place` has beside it by absolute paths."""
    monkeypatch.chdir(tmp_path)
    return place


def made(here: Path, *names: str, **options: Any) -> str:
    """The page of some of what is there."""
    config = ReportConfig(
        out=tuple(str(here / name) for name in names),
        html=Path("r.html"),
        overwrite=True,
        **options,
    )
    report(config)
    return Path("r.html").read_text()


def test_a_page_has_what_its_inputs_allow_and_says_what_it_lacks(
    here: Path, everything: str
) -> None:
    """Of an output alone its zeros and masks; with store and model all the rest."""
    alone = made(here, "owl")
    assert _headings(alone) == [
        *("Outputs", "Pruned share", "Masks", "Layers", "Provenance", "Not shown"),
    ]
    assert "give the store beside the outputs" in alone
    beside = made(here, "owl", "store")
    assert "they need the dense weights" in beside
    assert set(_headings(everything)) == {
        *("Outputs", "Sweep: sweep", "Pruned share", "Where the error lies"),
        *("Outliers", "Masks", "Scores and the cut", "Second moments", "Layers", "Provenance"),
    }
    assert _headings(made(here, "sweep")) == ["Sweep: sweep", "Provenance"]


def _headings(text: str) -> list[str]:
    return re.findall(r"<h2[^>]*>(.*?)</h2>", text)


def test_the_same_inputs_give_the_same_page(here: Path, everything: str) -> None:
    """To the byte, pictures included."""
    assert _everything(here) == everything


def test_a_page_asks_for_nothing_and_names_everything_once(everything: str) -> None:
    """No address but of its own parts and of data in it; no id twice; pictures told in words."""
    text = everything
    addresses = re.findall(r"(?:src|href)=\"([^\"]*)\"", text)
    ids = re.findall(r" id=\"([^\"]*)\"", text)
    assert {x.partition(":")[0] for x in addresses if x[0] != "#"} == {"data"}
    assert {x[1:] for x in addresses if x[0] == "#"} <= set(ids)
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
    pictures = re.findall(r"<svg role=\"img\".*?</desc>", text, re.DOTALL)
    assert len(pictures) == text.count("<figure>")
    assert all(re.search(r"<title[^>]*>.+</title><desc[^>]*>.+</desc>", x) for x in pictures)


def test_the_table_of_layers_has_what_was_measured(here: Path) -> None:
    """Zeros as in the files; errors and outliers as plain tensors give them."""
    store = GradientStore.open(str(here / "store"))
    dense, pruned = tensors_of(here / "model"), tensors_of(here / "owl")
    found = document_of(_found(here, "owl"))
    [table] = [t for s in found.sections for t in s.tables if t.name == "layers"]
    columns = {name.partition(",")[0]: i for i, name in enumerate(table.columns)}
    for row in table.rows:
        layer = store.spec.layer(str(row[0]))
        assert layer is not None
        weight, left = dense[layer.weight_key].double(), pruned[layer.weight_key].double()
        assert row[columns["zeros"]] == int((left == 0).sum()) / left.numel()
        hessian = _whole(store.read_norms(layer, "hessian"), layer.shape[1])
        energy = [float(((x @ hessian) * x).sum()) for x in (weight - left, weight)]
        assert row[columns["error"]] == pytest.approx((energy[0] / energy[1]) ** 0.5, rel=1e-3)
        scores = weight.abs() * torch.from_numpy(store.read_norms(layer, "act_l2")).double()
        assert row[columns["outlier ratio"]] == pytest.approx(
            float((scores > 5 * scores.mean()).double().mean()), abs=2e-3
        )


def _found(here: Path, output: str) -> Found:
    """What a report of an output with its store and model is made of."""
    from gradpipe.pipeline.progress import QUIET  # noqa: PLC0415
    from gradpipe.pipeline.report_facts import measure  # noqa: PLC0415

    name = str(here / output)
    outputs = {name: Recorded.read(here / output)}
    stores = {"store": GradientStore.open(str(here / "store"))}
    config = ReportConfig(out=(name,), model=str(here / "model"))
    facts = measure(config, outputs, stores, QUIET)
    return Found(outputs=outputs, sweeps=(), stores=stores, facts=facts)


def _whole(packed: Any, width: int) -> torch.Tensor:
    matrix = torch.zeros(width, width, dtype=torch.float64)
    matrix[torch.triu_indices(width, width).unbind()] = torch.from_numpy(packed).double()
    return matrix + matrix.T - matrix.diagonal().diag()


def test_masks_are_those_of_figure_4_and_of_the_files(here: Path) -> None:
    """Gradients with sign, as ℓ1, then the output's: True where the file has no zero."""
    found = _found(here, "owl")
    [layer] = found.facts.layers
    assert layer.name == KEY
    sign, l1, own = layer.masks
    kept = tensors_of(here / "owl")[f"{KEY}.weight"] != 0
    assert np.array_equal(own.kept, kept.float().numpy())
    for mask, statistic in ((sign, "grad_sum"), (l1, "grad_l1")):
        store = found.stores["store"]
        spec = store.spec.layer(KEY)
        assert spec is not None
        gradient = np.abs(store.read_norms(spec, statistic))
        score = gradient * tensors_of(here / "model")[f"{KEY}.weight"].abs().numpy()
        assert mask.kept.mean() == 0.5
        assert score[mask.kept == 1].min() >= score[mask.kept == 0].max()
    [scores] = layer.scores
    assert scores.kept.sum() == int(kept.sum())
    assert {x for x in found.facts.outliers if block_of(x) == x} == {
        "model.layers.0",
        "model.layers.1",
    }


def test_any_layer_is_shown_by_name(here: Path) -> None:
    """As often as asked; a name that is mistyped is answered with the nearest."""
    down = "model.layers.1.mlp.down_proj"
    text = made(here, "owl", layer=(KEY, down))
    assert f"Masks of {KEY}" in text
    assert f"Masks of {down}" in text
    with pytest.raises(InputError, match=rf"did you mean {down}\?$"):
        made(here, "owl", layer=("model.layers.1.mlp.donw_proj",))


def test_pictures_are_written_as_files_too(here: Path) -> None:
    """As SVG, which is well-formed and asks for nothing, and as PNG, under the same names."""
    made(here, "sweep", "owl", layer=(KEY,), figures=Path("figures"))
    names = {path.stem for path in Path("figures").iterdir()}
    assert {"curves-1", "pruned-by-block", "masks-1"} <= names
    for name in names:
        assert Path(f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = Path(f"figures/{name}.svg").read_text()
        ET.fromstring(svg)  # noqa: S314 (written here)
        assert set(re.findall(r"href=\"(.)", svg)) <= {"#", "d"}


def test_markdown_is_for_a_model_card(here: Path) -> None:
    """Tables, commands, and the pictures that were written; on stdout, and no page."""
    config = ReportConfig(out=(str(here / "owl"),), format="md", figures=Path("figures"))
    text = report(config)
    assert re.search(r"^\| output \| method \|.*\n\|---\|---\|---\|---:\|", text, re.MULTILINE)
    assert "    pipe prune model STORE OUT --allocation owl --sparsity 0.6 --method gblm\n" in text
    for picture in re.findall(r"\]\((.*?)\)", text):
        assert Path(picture).exists()
    assert not Path("report.html").exists()


# ---- what others wrote ----


def test_text_from_files_stays_text(here: Path) -> None:
    """In names, notes, commands and digests: shown, and never markup."""
    odd = here / HOSTILE.replace("/", "∕")
    if not odd.exists():
        odd.mkdir()
        document = json.loads((here / "owl" / "pruning.json").read_text())
        document |= {"notes": [HOSTILE], "command": HOSTILE, "model": HOSTILE, "method": HOSTILE}
        (odd / "pruning.json").write_text(json.dumps(document))
        for path in (here / "owl").glob("*.*"):
            if path.name != "pruning.json":
                (odd / path.name).symlink_to(path)
        write_points(odd, [point({"method": HOSTILE, "sparsity": 0.5}, 9.0)])
    text = made(here, odd.name)
    assert "&lt;img src=x onerror=" in text
    assert "<img" not in text
    assert text.count("<script>") == 1
    config = ReportConfig(out=(str(odd),), format="md")
    assert "<img" not in re.sub(r"(?m)^    .*$", "", report(config)).replace(r"\<", "")


# ---- size ----


def test_a_page_of_a_7b_model_stays_under_3_mb() -> None:
    """Four outputs of 32 blocks of 7 layers, all that can be measured, masks without any order."""
    kinds = [f"self_attn.{x}_proj" for x in "qkvo"] + [
        f"mlp.{x}_proj" for x in ("gate", "up", "down")
    ]
    names = [f"model.layers.{block}.{kind}" for block in range(32) for kind in kinds]
    layer = {"requested": 0.5, "pattern": None, "zeros": 8_388_123, "size": 16_777_216}
    document: dict[str, Any] = {
        "layers": dict.fromkeys(names, layer),
        "unseen_layers": [],
        "method": "gblm",
        "update": "none",
        "requested_sparsity": 0.5,
        "file_sparsity": 0.48,
        "dense_weights": {},
    }
    outputs = {f"out/s0.{i}0": Recorded.of(document) for i in range(4, 8)}
    values = {name: i / 7 for i, name in enumerate(names)}
    random = np.random.default_rng(0)
    masks = [MaskFact(title=x, kept=random.random((256, 256), np.float32)) for x in outputs]
    facts = Facts(
        layers=(LayerFacts(name=names[1], shape=(4096, 4096), masks=tuple(masks)),),
        outliers=values,
        errors=dict.fromkeys(outputs, values),
        ranks=dict.fromkeys(("hessian", "grad_cov"), values),
    )
    found = document_of(Found(outputs=outputs, sweeps=(), stores={}, facts=facts))
    assert isinstance(found, Document)
    size = len(page.html(found).encode())
    assert size < 3_000_000, f"{size:,} bytes"


# ---- what is refused ----


@pytest.mark.parametrize(
    ("out", "options", "said"),
    [
        (("nothing",), {}, "OUT .*nothing: no such folder, expected what pipe prune, "),
        (("model",), {}, "a folder with pruning.json, results.jsonl or a store"),
        (("owl",), {"html": Path("there.html")}, "--html there.html exists: .*--overwrite"),
        (("owl",), {"html": Path("no/such.html")}, "in a folder that exists"),
        (("owl",), {"figures": Path("full")}, "--figures full is not empty"),
        (("owl",), {"figures": Path("there.html")}, "--figures there.html: expected a folder"),
        (("owl", "store"), {"model": "other"}, "is not what the store was collected from"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    here: Path, out: tuple[str, ...], options: dict[str, Any], said: str
) -> None:
    """In one line, and nothing is written."""
    Path("there.html").write_text("mine")
    Path("full").mkdir()
    Path("full/file").touch()
    if options.get("model"):
        save_tiny("llama", Path("other"), seed=1)
    before = sorted(Path().rglob("*"))
    with pytest.raises(InputError, match=said):
        report(ReportConfig(out=tuple(str(here / name) for name in out), **options))
    assert sorted(Path().rglob("*")) == before
    assert Path("there.html").read_text() == "mine"


def test_an_output_of_another_model_than_the_store_is_refused(here: Path) -> None:
    """Its layers have the names of the store's, and other shapes."""
    shutil.copytree(here / "owl", "cut")
    key = f"{KEY}.weight"
    edit_weights(Path("cut"), lambda x: x.update({key: x[key][:, :-4].contiguous()}))
    out = ("cut", str(here / "store"))
    with pytest.raises(InputError, match=rf"cut: layer {re.escape(KEY)} is F32 .*another model's"):
        report(ReportConfig(out=out, model=str(here / "model")))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": {}}, "it names no layers"),
        ({"dense_weights": {"a": math.inf}}, "OverflowError"),
    ],
)
def test_a_record_that_lies_is_refused(here: Path, change: dict[str, Any], said: str) -> None:
    """Of nothing, or of infinitely many weights."""
    shutil.copytree(here / "owl", "lies")
    edit_record(Path("lies"), lambda x: x.update(change))
    with pytest.raises(InputError, match=said):
        report(ReportConfig(out=("lies",)))


def test_a_pattern_that_does_not_divide_the_inputs_has_no_cut(here: Path) -> None:
    """It is somebody's word for how weights were picked; the rest is shown all the same."""
    shutil.copytree(here / "owl", "odd")
    edit_record(Path("odd"), lambda x: x["layers"][KEY].update(pattern="5:7"))
    config = ReportConfig(out=("odd", str(here / "store")), model=str(here / "model"))
    report(config)
    assert "The cut lies at" not in Path("report.html").read_text()


def edit_record(out: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change an output's `pruning.json`."""
    document = json.loads((out / "pruning.json").read_text())
    edit(document)
    (out / "pruning.json").write_text(json.dumps(document))


def test_without_its_libraries_a_report_says_what_to_install(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is measured."""
    for name in ("gradpipe.pipeline.reports.pictures", "gradpipe.pipeline.reports.sections"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'gradpipe\[report\]'$"):
        report(ReportConfig(out=(str(here / "owl"),)))


def test_an_option_that_would_be_ignored_is_refused(here: Path) -> None:
    """A page's name beside Markdown."""
    out = (str(here / "owl"),)
    with pytest.raises(InputError, match=r"--html a\.html: --format md is written to stdout"):
        ReportConfig(out=out, html=Path("a.html"), format="md")
