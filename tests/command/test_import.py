"""Gradients that GBLM-Pruner's own code wrote: imported, they prune as collected ones."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gradpipe import GradientStore, ImportConfig, InputError, StoreError, import_gblm
from gradpipe.pipeline.collect import import_gblm as importing
from gradpipe.store.lock import locked
from gradpipe.store.writer import StoreWriter
from tests.support.cases import tensors_of
from tests.support.models import tiny_model
from tests.support.reference import reference_score, reference_statistics
from tests.support.workplace import LAYER, Pipe

COLLECT = "collect-grads model store --dataset text.txt --seq-len 16 --num-samples 4"
SAMPLES, ALPHA = 4, 100.0


def _gblm_files() -> None:
    """Write l1.pth and l2.pth for the store's samples, as the reference's own code does.

    Gradients of one sample at a time by plain autograd, times 100, summed as |G| and G², the root
    taken of the latter; float16 under `self_attn.q_proj_layer_0`.
    """
    ids = torch.from_numpy(GradientStore.open("store").input_ids()).long()
    l1, l2 = {}, {}
    for name, sums in reference_statistics(tiny_model("llama"), ids).items():
        block, module = name.removeprefix("model.layers.").split(".", 1)
        l1[f"{module}_layer_{block}"] = (100 * sums["grad_l1"]).half()
        l2[f"{module}_layer_{block}"] = (100**2 * sums["grad_l2"]).sqrt().half()
    torch.save(l1, "l1.pth")
    torch.save(l2, "l2.pth")


def _scores(name: str, grad_norm: str) -> Tensor:
    """The naive score of a layer, (out, in), from the collected store's sums."""
    store = GradientStore.open("store")
    layer = store.spec.layer(name)
    assert layer is not None
    norms = {s: torch.from_numpy(store.read_norms(layer, s)) for s in store.spec.statistics}
    sums = {s: norm**2 if s.endswith("l2") else norm for s, norm in norms.items()}
    weight = tensors_of(Path("model"))[layer.weight_key]
    return reference_score("gblm", weight, sums, SAMPLES, ALPHA, grad_norm)


def test_an_import_that_cannot_be_finished_removes_nothing(pipe: Pipe) -> None:
    """Activations are verified before the store that is to be replaced loses its record."""
    pipe(COLLECT)
    _gblm_files()
    command = "store import-gblm model imported --l1 l1.pth --activations store"
    pipe(command)
    part = next(Path("store").rglob("act_l2/values/c/0"))
    part.write_bytes(part.read_bytes()[:-1])
    config = ImportConfig(
        model="model",
        store=Path("imported"),
        l1=Path("l1.pth"),
        activations="store",
        overwrite=True,
    )
    with pytest.raises(StoreError, match="is damaged"):
        import_gblm(config)
    pipe("store verify imported")


def test_a_store_that_another_process_finished_meanwhile_is_kept(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --overwrite an import replaces no complete store, be it a moment old."""
    pipe(COLLECT)
    _gblm_files()
    config = ImportConfig(model="model", store=Path("new"), l1=Path("l1.pth"))

    @contextmanager
    def waited(path: Path, *, of: Path, wait: bool) -> Iterator[None]:
        pipe(COLLECT.replace(" store ", " new "))  # the other one, while this one waits
        with locked(path, of=of, wait=wait):
            yield

    monkeypatch.setattr(importing, "locked", waited)
    with pytest.raises(InputError, match="exists and is complete"):
        import_gblm(config)
    assert GradientStore.open("new").spec.samples.num_samples == SAMPLES


def test_an_unfinished_collection_is_not_thrown_away(pipe: Pipe) -> None:
    """It may be days of work, which the same command would go on with."""
    pipe(COLLECT)
    _gblm_files()
    store = GradientStore.open("store")
    StoreWriter(Path("begun"), store.spec).begin(store.calibration())
    config = ImportConfig(model="model", store=Path("begun"), l1=Path("l1.pth"))
    with pytest.raises(InputError, match="store begun exists and was begun by collect-grads"):
        import_gblm(config)
    import_gblm(replace(config, overwrite=True)).validate()


@pytest.mark.parametrize("grad_norm", ["l1", "l2"])
def test_imported_gradients_prune_as_collected_ones(pipe: Pipe, grad_norm: str) -> None:
    """Masks differ only where float16 cannot tell two scores apart."""
    pipe(f"{COLLECT} --encoding float32")
    _gblm_files()
    pipe(
        "store import-gblm model imported --l1 l1.pth --l2 l2.pth --activations store "
        f"--num-samples {SAMPLES}"
    )
    pipe("store verify imported")
    for store in ("store", "imported"):
        pipe(f"prune model {store} from-{store} --grad-norm {grad_norm}")
    one, other = (tensors_of(Path(f"from-{name}")) for name in ("store", "imported"))
    report = json.loads(Path("from-imported/pruning.json").read_text())
    assert len(report["layers"]) == 14
    differing = 0
    for name in report["layers"]:
        pruned, by_import = one[f"{name}.weight"] == 0, other[f"{name}.weight"] == 0
        assert torch.equal(pruned.sum(dim=1), by_import.sum(dim=1))
        scores = _scores(name, grad_norm)
        for row in range(len(scores)):
            swapped = scores[row][pruned[row] != by_import[row]]
            differing += len(swapped)
            if len(swapped):
                assert float(swapped.max() / swapped.min()) < 1 + 2**-9
    assert differing <= 0.01 * sum(layer["size"] for layer in report["layers"].values())


def test_files_of_parameters_are_files_of_tensors(pipe: Pipe) -> None:
    """What requires a gradient is read as well as what does not."""
    pipe(COLLECT)
    _gblm_files()
    parameters = {k: torch.nn.Parameter(x) for k, x in torch.load("l1.pth").items()}
    torch.save(parameters, "parameters.pth")
    digests = []
    for file in ("l1.pth", "parameters.pth"):
        config = ImportConfig(model="model", store=Path(file).with_suffix(""), l1=Path(file))
        store = import_gblm(config)
        digests.append(store.objects.record.objects[f"layers/{LAYER}/grad_l1/values/c/0/0"])
    assert digests[0] == digests[1]


def test_one_imported_norm_is_enough_for_the_gradient_alone(pipe: Pipe) -> None:
    """Without activations there is no GBLM score, and the gradient's needs none."""
    pipe(COLLECT)
    _gblm_files()
    out = pipe(f"store import-gblm model imported --l2 l2.pth --num-samples {SAMPLES}")
    assert "4 x 0 tokens of GBLM-Pruner" in out
    assert GradientStore.open("imported").spec.statistics == ("grad_l2",)
    pipe("prune model imported pruned --method gradient --grad-norm l2")
