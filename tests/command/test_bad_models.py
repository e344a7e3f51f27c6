"""Model folders that are damaged, of another kind or ambiguous: what is read, what is refused."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradpipe import GradientStore
from gradpipe.stages.checkpoint.folder import INDEX_NAME, SINGLE_NAME, Checkpoint
from tests.support.models import save_tiny
from tests.support.workplace import (
    COLLECT,
    EVAL,
    KEY,
    LAYER,
    PLANTED,
    PRUNE,
    Hostile,
    Refused,
    edit_config,
    edit_weights,
    succeed,
)


def _copy(workplace: Path, tmp_path: Path, name: str = "model") -> Path:
    return Path(shutil.copytree(workplace / name, tmp_path / "model"))


def _configure(**changes: object) -> Callable[[Path], None]:
    return lambda model: edit_config(model, **changes)


@pytest.mark.parametrize(
    "command",
    [
        "collect-grads {} new --dataset text.txt --seq-len 16",
        "prune {} store new",
        "eval {} --dataset text.txt --seq-len 16",
        "store import-gblm {} new --l1 l1.pth",
    ],
)
def test_a_model_path_must_be_one(refused: Refused, command: str) -> None:
    """A missing path, a file, and a folder without `config.json` are told apart."""
    refused(command.format("missing"), says=("missing is neither a model directory nor a Hub id",))
    refused(command.format("text.txt"), says=("text.txt is a file, expected a model directory",))
    refused(command.format("foreign"), says=("foreign is not a model directory", "config.json"))


def _lose_a_shard(model: Path) -> None:
    (model / "model-00002-of-00006.safetensors").unlink()


def _point_outside(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"][KEY] = "../model/model.safetensors"
    index.write_text(json.dumps(document))


def _swap_two_shards(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    files = sorted(set(document["weight_map"].values()))
    document["weight_map"][KEY] = next(f for f in files if f != document["weight_map"][KEY])
    index.write_text(json.dumps(document))


def _empty_the_index(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text("{}")


def _garble_the_index(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text('{"weight_map": ')


@pytest.mark.parametrize("command", [COLLECT, PRUNE, EVAL])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_lose_a_shard, ("lacks 1 of", "model-00002-of-00006.safetensors", "fetch it")),
        (_point_outside, ("names a file outside", "../model/model.safetensors")),
        (_swap_two_shards, (KEY, "does not hold it")),
        (_empty_the_index, ("model.safetensors.index.json", "no weight_map", "restore")),
        (_garble_the_index, ("model.safetensors.index.json", "cannot read")),
    ],
)
def test_shards_must_be_as_the_index_says(
    refused: Refused,
    workplace: Path,
    tmp_path: Path,
    command: str,
    damage: Callable[[Path], None],
    says: tuple[str, ...],
) -> None:
    """A shard that is missing, elsewhere or another one is found before anything is computed."""
    shutil.copytree(workplace / "sharded", tmp_path / "model")
    damage(tmp_path / "model")
    refused(command.replace("model", str(tmp_path / "model"), 1), says=says)


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.0001, 0.01, 0.5, 0.999])
def test_a_truncated_safetensors_file_is_named(
    refused: Refused, workplace: Path, tmp_path: Path, share: float
) -> None:
    """Wherever it ends, in its length, its header or its data, the file is not used."""
    shutil.copytree(workplace / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(share * len(data))])
    for command in (COLLECT, PRUNE, EVAL):
        refused(
            command.replace("model", str(tmp_path / "model"), 1),
            says=(f"{weights} is not a whole safetensors file", "fetch it again"),
        )


def test_the_hostile_pickle_would_work(tmp_path: Path) -> None:
    """What the next tests plant does create its file where pickle is trusted."""
    pickle.loads(pickle.dumps(Hostile(tmp_path / PLANTED)))  # noqa: S301 (that is the point)
    assert (tmp_path / PLANTED).exists()


@pytest.mark.parametrize("command", [COLLECT, PRUNE, EVAL])
def test_a_pickled_checkpoint_is_refused_unread(
    refused: Refused, workplace: Path, tmp_path: Path, command: str
) -> None:
    """Nothing in it is run, and the line says how to convert it."""
    model = tmp_path / "model"
    shutil.copytree(workplace / "model", model)
    (model / "model.safetensors").unlink()
    torch.save({"weight": Hostile(tmp_path / PLANTED)}, model / "pytorch_model.bin")
    refused(
        command.replace("model", str(model), 1),
        says=("as pickle (pytorch_model.bin)", "can run code", "save_pretrained"),
    )


def test_a_model_s_own_code_is_never_run(refused: Refused, workplace: Path, tmp_path: Path) -> None:
    """Without a question on stdout either, which a script would wait for."""
    model = tmp_path / "model"
    shutil.copytree(workplace / "model", model)
    classes = {"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.A"}
    edit_config(model, model_type="evil", auto_map=classes)
    (model / "evil.py").write_text(f"open({str(tmp_path / PLANTED)!r}, 'w')\nclass A: pass\n")
    for command in (COLLECT, EVAL):
        refused(command.replace("model", str(model), 1), says=("its own code", "never run"))


def _drop(key: str) -> Callable[[Path], None]:
    return lambda model: edit_weights(model, lambda tensors: tensors.pop(key))


def _shrink_the_vocabulary(model: Path) -> None:
    keys = ("model.embed_tokens.weight", "lm_head.weight")
    edit_weights(model, lambda t: t.update({k: t[k][:40].clone() for k in keys}))
    edit_config(model, vocab_size=40)


def _garble_the_config(model: Path) -> None:
    (model / "config.json").write_text("{")


@pytest.mark.parametrize("command", [COLLECT, f"{COLLECT} --dry-run"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_garble_the_config, ("cannot read", "config.json")),
        (_configure(model_type="nonesuch"), ("cannot read its config.json", "nonesuch")),
        (_configure(num_attention_heads=0), ("transformers cannot read its config.json", "zero")),
        (_configure(quantization_config="int4"), ("config.json",)),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_in_a_plan_too(
    refused: Refused,
    workplace: Path,
    tmp_path: Path,
    command: str,
    damage: Callable[[Path], None],
    says: tuple[str, ...],
) -> None:
    """Whatever transformers raises over it."""
    model = _copy(workplace, tmp_path)
    damage(model)
    refused(command.replace("model", str(model), 1), says=says)


@pytest.mark.parametrize("command", [COLLECT, EVAL])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_garble_the_config, ("cannot read", "config.json")),
        (_configure(model_type=None), ("cannot read its config.json", "model_type")),
        (_configure(model_type="nonesuch"), ("cannot read its config.json", "nonesuch")),
        (_configure(hidden_size="wide"), ("cannot read its config.json", "'hidden_size'", "wide")),
        (_configure(model_type="t5"), ("as a causal language model", "T5Config")),
        (_configure(hidden_size=64), ("(96, 32), by its config.json (96, 64)",)),
        (
            _configure(num_hidden_layers=3),
            ("nothing for 9 of the tensors", "first model.layers.2.", "not all of them"),
        ),
        (_drop("model.norm.weight"), ("nothing for 1 of the tensors", "first model.norm.weight")),
        (_drop(KEY), ("nothing for 1 of the tensors", f"first {KEY}")),
        (_shrink_the_vocabulary, ("the text holds token", "has 40", "belongs to another model")),
    ],
)
def test_a_model_that_transformers_would_make_up_or_choke_on_is_refused(
    refused: Refused,
    workplace: Path,
    tmp_path: Path,
    command: str,
    damage: Callable[[Path], None],
    says: tuple[str, ...],
) -> None:
    """Missing weights are not drawn at random, and config, weights and tokenizer must agree."""
    shutil.copytree(workplace / "model", tmp_path / "model")
    damage(tmp_path / "model")
    refused(command.replace("model", str(tmp_path / "model"), 1), says=says)


def test_an_odd_list_of_architectures_is_no_reason_to_fail(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The field is recorded, not used."""
    shutil.copytree(workplace / "model", tmp_path / "model")
    shutil.copy(workplace / "text.txt", tmp_path)
    edit_config(tmp_path / "model", architectures=5)
    monkeypatch.chdir(tmp_path)
    succeed(f"{COLLECT} --statistics act_l2", monkeypatch)


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
        says = ("has no tokenizer, such as tokenizer.json: copy it from",)
        refused(command.replace("model", str(model), 1), says=says)


def test_a_broken_tokenizer_is_told_with_its_fault(
    refused: Refused, workplace: Path, tmp_path: Path
) -> None:
    """The fault stands inside the line, what to do at its end."""
    model = _copy(workplace, tmp_path)
    (model / "tokenizer.json").write_text("{")
    says = (
        "cannot load its tokenizer (",
        "): install what it needs, or mend its files, such as tokenizer.json\n",
    )
    refused(EVAL.replace("model", str(model), 1), says=says)
