"""Model folders that are damaged, of another kind or ambiguous: what is read, what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradpipe import GradientStore
from gradpipe.stages.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from tests.models import save_tiny
from tests.workplace import COLLECT, EVAL, KEY, LAYER, PRUNE, Refused, edit_config, succeed


def _copy(workplace: Path, tmp_path: Path, name: str = "model") -> Path:
    return Path(shutil.copytree(workplace / name, tmp_path / "model"))


def test_the_single_file_comes_before_an_index(workplace: Path, tmp_path: Path) -> None:
    """As transformers has it: the index beside it is not looked into, and no copy gets it."""
    model = _copy(workplace, tmp_path, "sharded")
    shutil.copy(workplace / "other-weights" / SINGLE_NAME, model)
    (model / INDEX_NAME).write_text("stale")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("{{ x }}")
    checkpoint = Checkpoint.open(str(model))
    expected = load_file(workplace / "other-weights" / SINGLE_NAME)[KEY]
    assert torch.equal(checkpoint.read(KEY), expected)
    names = {str(path) for path in checkpoint.companions()}
    assert {"config.json", "tokenizer.json", "additional_chat_templates/rag.jinja"} <= names
    assert INDEX_NAME not in names
    assert {str(x) for x in Checkpoint.open(str(workplace / "sharded")).companions()} >= {
        "config.json",
        INDEX_NAME,
    }


def _retype(dtype: torch.dtype) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        tensors = load_file(model / SINGLE_NAME)
        tensors[KEY] = tensors[KEY].to(dtype)
        save_file(tensors, model / SINGLE_NAME, metadata={"format": "pt"})

    return damage


def _configure(**changes: object) -> Callable[[Path], None]:
    return lambda model: edit_config(model, **changes)


_TYPE = "expected F16, BF16, F32 or F64 weights: give the model before it was quantized"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_retype(torch.int8), (f"layer {LAYER} is of type I8: {_TYPE}",)),
        (_retype(torch.float8_e4m3fn), (f"layer {LAYER} is of type F8_E4M3: {_TYPE}",)),
        (
            _configure(quantization_config={"quant_method": "gptq", "bits": 4}),
            ("is quantized (gptq in its config.json)", "before it was quantized"),
        ),
        (
            _configure(quantization_config={"load_in_8bit": True}),
            ("is quantized (quantization_config in its config.json)",),
        ),
    ],
)
def test_quantized_weights_are_refused_before_a_store_is_begun(
    refused: Refused,
    workplace: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    says: tuple[str, ...],
) -> None:
    """Codes have no gradients: no hour is spent on them."""
    model = _copy(workplace, tmp_path)
    damage(model)
    refused(COLLECT.replace("model", str(model), 1), says=says)
    refused(COLLECT.replace("model", str(model), 1) + " --schedule streamed", says=says)


def test_prune_says_the_same_of_quantized_weights(
    refused: Refused, workplace: Path, tmp_path: Path
) -> None:
    """The line is one and the same in both stages."""
    model = _copy(workplace, tmp_path)
    _retype(torch.int8)(model)
    refused(PRUNE.replace("model", str(model), 1), says=(f"layer {LAYER} is of type I8: {_TYPE}",))


def _only(name: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        (model / SINGLE_NAME).rename(model / name)

    return damage


def _dangle(model: Path) -> None:
    (model / SINGLE_NAME).unlink()
    (model / SINGLE_NAME).symlink_to("blobs/gone")


def _unlink(model: Path) -> None:
    (model / SINGLE_NAME).unlink()


@pytest.mark.parametrize("command", [COLLECT, PRUNE, EVAL])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_unlink, ("has no weights", SINGLE_NAME, "fetch it again")),
        (_dangle, (f"{SINGLE_NAME} is a link to nothing", "fetch it again")),
        (_only("model-q4.gguf"), ("as model-q4.gguf", "made from")),
        (_only("tf_model.h5"), ("as tf_model.h5", "made from")),
        (
            _only("model-00001-of-00002.safetensors"),
            ("such as model-00001-of-00002.safetensors", INDEX_NAME, "fetch that too"),
        ),
    ],
)
def test_a_folder_without_weights_is_told_what_it_has(
    refused: Refused,
    workplace: Path,
    tmp_path: Path,
    command: str,
    damage: Callable[[Path], None],
    says: tuple[str, ...],
) -> None:
    """Nothing, a broken link, another format or shards without their index."""
    model = _copy(workplace, tmp_path)
    damage(model)
    refused(command.replace("model", str(model), 1), says=says)


@pytest.mark.parametrize(("base", "name"), [("model", "config.json"), ("sharded", INDEX_NAME)])
def test_json_nested_beyond_reason_is_refused(
    refused: Refused, workplace: Path, tmp_path: Path, base: str, name: str
) -> None:
    """It exhausts the reader's stack, not the user's patience."""
    model = _copy(workplace, tmp_path, base)
    (model / name).write_text("[" * 100_000)
    for command in (COLLECT, PRUNE, EVAL):
        refused(command.replace("model", str(model), 1), says=("cannot read", name, "recursion"))


def test_a_float64_checkpoint_is_computed_in_float32(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its config says so or only its tensors; the store says float32."""
    model = save_tiny("llama", tmp_path / "model")
    tensors = {k: v.double() for k, v in load_file(model / SINGLE_NAME).items()}
    save_file(tensors, model / SINGLE_NAME, metadata={"format": "pt"})
    monkeypatch.chdir(workplace)
    for number, dtype in enumerate((None, "float64")):
        edit_config(model, dtype=dtype)
        store = tmp_path / f"store-{number}"
        succeed(COLLECT.replace("model", str(model), 1).replace("new", str(store)), monkeypatch)
        assert GradientStore.open(str(store)).spec.model.dtype == "float32"


@pytest.mark.parametrize("name", ["model", "other-names"])
def test_a_model_without_a_tokenizer_is_told_so(
    refused: Refused, workplace: Path, tmp_path: Path, name: str
) -> None:
    """In a whole sentence; and of a GPT-2 transformers would make an empty one up."""
    model = _copy(workplace, tmp_path, name)
    for path in [*model.glob("tokenizer*"), *model.glob("vocab*"), *model.glob("merges*")]:
        path.unlink()
    for command in (COLLECT, EVAL):
        says = ("has no tokenizer, such as tokenizer.json: fetch it again, or copy it from",)
        refused(command.replace("model", str(model), 1), says=says)


def test_a_broken_tokenizer_is_told_with_its_fault(
    refused: Refused, workplace: Path, tmp_path: Path
) -> None:
    """The fault stands inside the line, what to do at its end."""
    model = _copy(workplace, tmp_path)
    (model / "tokenizer.json").write_text("{")
    says = ("cannot load its tokenizer (", "): fetch its files again, such as tokenizer.json\n")
    refused(EVAL.replace("model", str(model), 1), says=says)


# ---- heads and embeddings ----

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


def _tie(model: Path, *, with_head: bool) -> None:
    """As some models are saved: the head equals the embedding, and may stand in the file too."""
    tensors = load_file(model / SINGLE_NAME)
    tensors.pop(f"{HEAD}.weight")
    if with_head:
        tensors[f"{HEAD}.weight"] = tensors[f"{EMBEDDING}.weight"].clone()
    save_file(tensors, model / SINGLE_NAME, metadata={"format": "pt"})
    edit_config(model, tie_word_embeddings=True)


def test_tied_matrices_are_pruned_together_or_not_at_all(
    refused: Refused, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers makes one of the two: which zeros it has must not depend on its version."""
    model = _copy(workplace, tmp_path)
    _tie(model, with_head=True)
    command = PRUNE.replace("model", str(model), 1) + " --method magnitude"
    for one, other in ((HEAD, EMBEDDING), (EMBEDDING, HEAD)):
        says = (f"layers {one} and {other}", "are tied", f"--include {other} as well")
        refused(f"{command} --include {one}", says=says)
        refused(f"{command} --include {HEAD} --include embed --exclude {other}", says=says)
    out = tmp_path / "out"
    monkeypatch.chdir(workplace)
    succeed(f"{command.replace('new', str(out))} --include {HEAD} --include embed", monkeypatch)
    tensors = load_file(out / SINGLE_NAME)
    assert torch.equal(tensors[f"{HEAD}.weight"], tensors[f"{EMBEDDING}.weight"])
    assert int((tensors[f"{HEAD}.weight"] == 0).sum()) == tensors[f"{HEAD}.weight"].numel() // 2


def test_an_equal_head_that_is_not_tied_goes_its_own_way(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where config.json says so; and where the two differ."""
    model = _copy(workplace, tmp_path)
    _tie(model, with_head=True)
    edit_config(model, tie_word_embeddings=False)
    monkeypatch.chdir(workplace)
    command = f"prune {{}} store {{}} --method magnitude --include {HEAD}"
    succeed(command.format(model, tmp_path / "untied"), monkeypatch)
    succeed(command.format("model", tmp_path / "different"), monkeypatch)


def test_a_head_that_is_tied_is_found_under_its_embedding(
    refused: Refused, workplace: Path, tmp_path: Path
) -> None:
    """The checkpoint has one tensor for both, by the embedding's name."""
    model = _copy(workplace, tmp_path)
    _tie(model, with_head=False)
    says = (f"--include {HEAD}: the head of", f"is tied to {EMBEDDING}: give --include {EMBEDDING}")
    refused(f"{PRUNE.replace('model', str(model), 1)} --include {HEAD}", says=says)


def test_an_embedding_is_not_said_to_have_statistics(refused: Refused) -> None:
    """No collection measures one: only its size can be looked at."""
    says = ("lacks grad_l1", "an embedding has no statistics", "--method magnitude alone")
    refused(f"{PRUNE} --include {EMBEDDING}", says=says)


def test_an_imported_store_gets_what_it_lacks_by_import(
    refused: Refused, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradients came from files, and no collection would add to them."""
    store = tmp_path / "imported"
    monkeypatch.chdir(workplace)
    succeed(f"store import-gblm model {store} --l1 l1.pth", monkeypatch)
    command = PRUNE.replace("store", str(store))
    refused(command, says=("lacks act_l2", "import again with import-gblm --activations STORE"))
    says = ("lacks grad_l2", "import again with import-gblm --l2 FILE")
    refused(f"{command} --method gradient --grad-norm l2", says=says)
