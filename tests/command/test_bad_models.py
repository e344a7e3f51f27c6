"""Model folders that are damaged, of another kind or ambiguous: what is read, what is refused."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

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

Damage = Callable[[Path], object]
EVERY, RUN, PLANNED = (COLLECT, PRUNE, EVAL), (COLLECT, EVAL), (COLLECT, f"{COLLECT} --dry-run")
STREAMED = (COLLECT, f"{COLLECT} --schedule streamed")


def _copy(workplace: Path, tmp_path: Path, name: str = "model") -> Path:
    return Path(shutil.copytree(workplace / name, tmp_path / "model"))


def _of(command: str, model: Path) -> str:
    """The command, of another model than the workplace's."""
    return command.replace("model", str(model), 1)


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


# ---- what may be wrong with a folder ----


def _configure(**changes: object) -> Damage:
    return lambda model: edit_config(model, **changes)


def _reweigh(edit: Callable[[dict[str, Tensor]], object]) -> Damage:
    return lambda model: edit_weights(model, edit)


def _drop(key: str) -> Damage:
    return _reweigh(lambda tensors: tensors.pop(key))


def _write(name: str, text: str) -> Damage:
    return lambda model: (model / name).write_text(text)


def _only(name: str) -> Damage:
    return lambda model: (model / SINGLE_NAME).rename(model / name)


def _unlink(name: str) -> Damage:
    return lambda model: (model / name).unlink()


def _dangle(model: Path) -> None:
    (model / SINGLE_NAME).unlink()
    (model / SINGLE_NAME).symlink_to("blobs/gone")


def _reindex(choose: Callable[[str, list[str]], str]) -> Damage:
    """Say that a tensor is in another file than it is."""

    def damage(model: Path) -> None:
        document = json.loads((model / INDEX_NAME).read_text())
        files = document["weight_map"]
        files[KEY] = choose(files[KEY], sorted(files.values()))
        (model / INDEX_NAME).write_text(json.dumps(document))

    return damage


def _shrink_the_vocabulary(model: Path) -> None:
    keys = ("model.embed_tokens.weight", "lm_head.weight")
    edit_weights(model, lambda t: t.update({k: t[k][:40].clone() for k in keys}))
    edit_config(model, vocab_size=40)


def _retype(dtype: torch.dtype) -> Damage:
    """Codes of a quantization, and their scale beside them."""

    def quantize(tensors: dict[str, Tensor]) -> None:
        scale = tensors[KEY].abs().max() / 100
        tensors[KEY] = (tensors[KEY] / scale).to(dtype)
        tensors[f"{KEY}_scale"] = scale.reshape(1)

    return _reweigh(quantize)


def _adapt(tensors: dict[str, Tensor]) -> None:
    rows, columns = tensors[KEY].shape
    tensors[f"{LAYER}.lora_A.weight"] = torch.ones(2, columns)
    tensors[f"{LAYER}.lora_B.weight"] = torch.ones(rows, 2)


def _wrap(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.base_layer.weight"] = tensors.pop(KEY)


# ---- what is said of it ----

Fault = tuple[tuple[str, ...], Damage, tuple[str, ...]]  # commands that refuse, why, their words
_TYPE = "expected F16, BF16, F32 or F64 weights: give the model before it was quantized"
_CONFIG: tuple[Fault, ...] = (
    ((*PLANNED, EVAL), _write("config.json", "{"), ("cannot read", "config.json")),
    (
        (*PLANNED, EVAL),
        _configure(model_type="nonesuch"),
        ("cannot read its config.json", "nonesuch"),
    ),
    (
        PLANNED,
        _configure(num_attention_heads=0),
        ("transformers cannot read its config.json", "zero"),
    ),
    (PLANNED, _configure(quantization_config="int4"), ("config.json",)),
    (RUN, _configure(model_type=None), ("cannot read its config.json", "model_type")),
    (
        RUN,
        _configure(hidden_size="wide"),
        ("cannot read its config.json", "'hidden_size'", "wide"),
    ),
    (EVERY, _write("config.json", "[" * 100_000), ("cannot read", "config.json", "recursion")),
)
_OTHER_WEIGHTS: tuple[Fault, ...] = (  # transformers would make up what lacks, or choke on it
    (RUN, _configure(model_type="t5"), ("as a causal language model", "T5Config")),
    (RUN, _configure(hidden_size=64), ("(96, 32), by its config.json (96, 64)",)),
    (
        RUN,
        _configure(num_hidden_layers=3),
        ("nothing for 9 of the tensors", "first model.layers.2.", "not all of them"),
    ),
    (
        RUN,
        _drop("model.norm.weight"),
        ("nothing for 1 of the tensors", "first model.norm.weight"),
    ),
    (RUN, _drop(KEY), ("nothing for 1 of the tensors", f"first {KEY}")),
    (RUN, _shrink_the_vocabulary, ("the text holds token", "has 40", "belongs to another model")),
    (EVERY, _write("adapter_config.json", "{}"), ("(adapter_config.json)", "merge it into them")),
    ((COLLECT,), _reweigh(_adapt), (f"{LAYER}.lora_A.weight", "merge it into them")),
    ((COLLECT,), _reweigh(_wrap), (f"{LAYER}.base_layer.weight", "merge_and_unload")),
)
_NO_WEIGHTS: tuple[Fault, ...] = (  # nothing, a broken link, another format, or no index
    (EVERY, _unlink(SINGLE_NAME), ("has no weights", SINGLE_NAME, "fetch it again")),
    (EVERY, _dangle, (f"{SINGLE_NAME} is a link to nothing", "fetch it again")),
    (EVERY, _only("model-q4.gguf"), ("as model-q4.gguf", "made from")),
    (EVERY, _only("tf_model.h5"), ("as tf_model.h5", "made from")),
    (
        EVERY,
        _only("model-00001-of-00002.safetensors"),
        ("such as model-00001-of-00002.safetensors", INDEX_NAME, "fetch that too"),
    ),
)
_CODES: tuple[Fault, ...] = (  # of a quantization: they have no gradients, and are no weights
    ((*STREAMED, PRUNE), _retype(torch.int8), (f"layer {LAYER} is of type I8: {_TYPE}",)),
    (STREAMED, _retype(torch.float8_e4m3fn), (f"layer {LAYER} is of type F8_E4M3: {_TYPE}",)),
    *(
        ((EVAL,), _retype(dtype), (f"{LAYER} is of type ", "before it was quantized"))
        for dtype in (torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn)
    ),
    (
        (*STREAMED, PRUNE),
        _configure(quantization_config={"quant_method": "gptq", "bits": 4}),
        ("is quantized (gptq in its config.json)", "before it was quantized"),
    ),
    (
        STREAMED,
        _configure(quantization_config={"load_in_8bit": True}),
        ("is quantized (quantization_config in its config.json)",),
    ),
    (
        (EVAL,),
        _configure(quantization_config={"quant_method": "of-tomorrow", "bits": 3}),
        ("does not know the quantization_config",),
    ),
    ((EVAL,), _configure(quantization_config={"bits": 3}), ("quant_method",)),
    ((EVAL,), _configure(quantization_config="int8"), ("transformers cannot",)),
)
_SHARDS: tuple[Fault, ...] = (
    (
        EVERY,
        _unlink("model-00002-of-00006.safetensors"),
        ("lacks 1 of", "model-00002-of-00006.safetensors", "fetch it"),
    ),
    (
        EVERY,
        _reindex(lambda *_: "../model/model.safetensors"),
        ("names a file outside", "../model/model.safetensors"),
    ),
    (
        EVERY,
        _reindex(lambda own, files: next(file for file in files if file != own)),
        (KEY, "does not hold it"),
    ),
    (EVERY, _write(INDEX_NAME, "{}"), (INDEX_NAME, "no weight_map", "restore")),
    (EVERY, _write(INDEX_NAME, '{"weight_map": '), (INDEX_NAME, "cannot read")),
    (EVERY, _write(INDEX_NAME, "[" * 100_000), ("cannot read", INDEX_NAME, "recursion")),
)


@pytest.mark.parametrize(
    ("base", "fault"),
    [
        *(("model", x) for x in (*_CONFIG, *_OTHER_WEIGHTS, *_NO_WEIGHTS, *_CODES)),
        *(("sharded", x) for x in _SHARDS),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_with_its_fault(
    refused: Refused, workplace: Path, tmp_path: Path, base: str, fault: Fault
) -> None:
    """By every command that would read it, in one line, before anything is computed."""
    commands, damage, says = fault
    model = _copy(workplace, tmp_path, base)
    damage(model)
    for command in commands:
        refused(_of(command, model), says=says)


def test_an_adapter_alone_is_refused(refused: Refused, tmp_path: Path) -> None:
    """It is no model."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    says = ("is an adapter alone", "merge it into the model")
    refused(_of(COLLECT, tmp_path / "adapter"), says=says)


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.0001, 0.01, 0.5, 0.999])
def test_a_truncated_safetensors_file_is_named(
    refused: Refused, workplace: Path, tmp_path: Path, share: float
) -> None:
    """Wherever it ends, in its length, its header or its data, the file is not used."""
    weights = _copy(workplace, tmp_path) / SINGLE_NAME
    data = weights.read_bytes()
    weights.write_bytes(data[: int(share * len(data))])
    for command in EVERY:
        says = (f"{weights} is not a whole safetensors file", "fetch it again")
        refused(_of(command, weights.parent), says=says)


def test_the_hostile_pickle_would_work(tmp_path: Path) -> None:
    """What the next tests plant does create its file where pickle is trusted."""
    pickle.loads(pickle.dumps(Hostile(tmp_path / PLANTED)))  # noqa: S301 (that is the point)
    assert (tmp_path / PLANTED).exists()


@pytest.mark.parametrize("command", EVERY)
def test_a_pickled_checkpoint_is_refused_unread(
    refused: Refused, workplace: Path, tmp_path: Path, command: str
) -> None:
    """Nothing in it is run, and the line says how to convert it."""
    model = _copy(workplace, tmp_path)
    (model / "model.safetensors").unlink()
    torch.save({"weight": Hostile(tmp_path / PLANTED)}, model / "pytorch_model.bin")
    says = ("as pickle (pytorch_model.bin)", "can run code", "save_pretrained")
    refused(_of(command, model), says=says)


def test_a_model_s_own_code_is_never_run(refused: Refused, workplace: Path, tmp_path: Path) -> None:
    """Without a question on stdout either, which a script would wait for."""
    model = _copy(workplace, tmp_path)
    classes = {"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.A"}
    edit_config(model, model_type="evil", auto_map=classes)
    (model / "evil.py").write_text(f"open({str(tmp_path / PLANTED)!r}, 'w')\nclass A: pass\n")
    for command in RUN:
        refused(_of(command, model), says=("its own code", "never run"))


def test_an_odd_list_of_architectures_is_no_reason_to_fail(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The field is recorded, not used."""
    model = _copy(workplace, tmp_path)
    shutil.copy(workplace / "text.txt", tmp_path)
    edit_config(model, architectures=5)
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


def test_whole_numbers_where_the_model_has_them_are_no_codes(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GPT-2's masks in old checkpoints, which transformers passes by."""
    model = _copy(workplace, tmp_path, "other-names")
    mask = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    edit_weights(model, lambda tensors: tensors.update({"h.0.attn.bias": mask}))
    monkeypatch.chdir(workplace)
    values = []
    for name in ("other-names", str(model)):
        succeed(f"{_of(EVAL, Path(name))} --json {tmp_path}/eval.json", monkeypatch)
        values.append(json.loads((tmp_path / "eval.json").read_text())["perplexity"])
    assert values[0] == values[1]


def test_a_float64_checkpoint_is_computed_in_float32(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its config says so or only its tensors; the store says float32."""
    model = save_tiny("llama", tmp_path / "model")
    edit_weights(model, lambda tensors: tensors.update({k: x.double() for k, x in tensors.items()}))
    monkeypatch.chdir(workplace)
    for number, dtype in enumerate((None, "float64")):
        edit_config(model, dtype=dtype)
        store = tmp_path / f"store-{number}"
        succeed(_of(COLLECT, model).replace("new", str(store)), monkeypatch)
        assert GradientStore.open(str(store)).spec.model.dtype == "float32"


@pytest.mark.parametrize("name", ["model", "other-names"])
def test_a_model_without_a_tokenizer_is_told_so(
    refused: Refused, workplace: Path, tmp_path: Path, name: str
) -> None:
    """In a whole sentence; and of a GPT-2 transformers would make an empty one up."""
    model = _copy(workplace, tmp_path, name)
    for path in [*model.glob("tokenizer*"), *model.glob("vocab*"), *model.glob("merges*")]:
        path.unlink()
    for command in RUN:
        says = ("has no tokenizer, such as tokenizer.json: copy it from",)
        refused(_of(command, model), says=says)


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
    refused(_of(EVAL, model), says=says)
