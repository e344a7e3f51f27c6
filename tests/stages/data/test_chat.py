"""Chat data: what the model is given is what the tokenizer's own template makes of a conversation.

The expected tokens are `apply_chat_template(…, tokenize=True)`, transformers' way to inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from gradpipe import CollectConfig, DataConfig, EvalConfig, InputError, collect, evaluate
from gradpipe.stages.data.chat import ChatTemplate
from gradpipe.stages.data.text import Text, load_text
from gradpipe.stages.data.windows import draw_samples, evaluation_windows
from tests.support.models import save_tiny, tiny_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
OF_PARTS = (  # as LLaVA's: a content that is a string is dropped
    "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] | selectattr('type', "
    "'equalto', 'text') %}{{ p['text'] }}{% endfor %}{% endfor %}"
)
SAYINGS = ("was it one, two or three in ten?", "the fox jumps", "a lazy dog", "sums add; codes do")
CHATS = [
    [
        {"role": "user", "content": f"{SAYINGS[n % 4]} " * (n + 1)},
        {"role": "assistant", "content": f"{SAYINGS[(n + 1) % 4]} " * (n + 2)},
    ]
    for n in range(6)
]
SHAREGPT = [
    [
        {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
        for m in chat
    ]
    for chat in CHATS
]
PARTS = [
    [
        m | {"content": [{"type": "text", "text": x} for x in (m["content"][:5], m["content"][5:])]}
        for m in chat
    ]
    for chat in CHATS
]


def tokenizer(template: str | None = TEMPLATE) -> Any:
    """One that sets <s> before a plain text, as Llama's does, and has a chat template."""
    made: Any = tiny_tokenizer()
    made._tokenizer.post_processor = TemplateProcessing(  # noqa: SLF001 (transformers' own way)
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    made.chat_template = template
    return made


def given(chat: list[dict[str, str]]) -> list[int]:
    """The tokens that transformers makes of a conversation."""
    ids: list[int] = tokenizer().apply_chat_template(chat, tokenize=True)["input_ids"]
    return ids


def write_json(path: Path, column: str, rows: list[Any]) -> Path:
    """One conversation a line."""
    path.write_text("\n".join(json.dumps({"id": 1, column: row}) for row in rows))
    return path


def write_parquet(path: Path, column: str, rows: list[Any]) -> Path:
    """Lists of structs; one message has a field that the others lack."""
    rows = [[*row[:-1], {**row[-1], "name": "fox"}] for row in rows]
    pq.write_table(pa.table({"id": [*range(len(rows))], column: rows}), path)
    return path


Write = Callable[[Path, str, list[Any]], Path]


@pytest.mark.parametrize(
    ("write", "name"), [(write_json, "chats.jsonl"), (write_parquet, "chats.parquet")]
)
@pytest.mark.parametrize(
    ("column", "rows", "asked"),
    [
        ("messages", CHATS, None),
        ("conversations", SHAREGPT, None),
        ("conversations", CHATS, None),
        ("messages", PARTS, None),
        ("turns", SHAREGPT, "turns"),
    ],
    ids=["messages", "sharegpt", "messages-as-conversations", "parts", "by-name"],
)
def test_windows_are_of_what_the_template_makes(
    tmp_path: Path, write: Write, name: str, column: str, rows: list[Any], asked: str | None
) -> None:
    """In every file and form, found by its name where there is no text; with one <s> each."""
    path = str(write(tmp_path / name, column, rows))
    data = DataConfig(name=path, text_column=asked) if asked else DataConfig(name=path)
    text = load_text(data, "calibration", tokenizer())
    spec, calibration = draw_samples("chats", text, tokenizer(), 12, 20, 0)
    assert spec.sampling == "chat document"
    windows, sources = calibration.arrays["input_ids"], calibration.arrays["sources"]
    for window, (row, start) in zip(windows.tolist(), sources.tolist(), strict=True):
        assert window == given(CHATS[row])[start : start + 20]
    assert len({row for row, _ in sources.tolist()}) > 3


def test_evaluation_joins_conversations_as_they_are(tmp_path: Path) -> None:
    """Nothing is set between two: each begins and ends as its template says."""
    data = DataConfig(name=str(write_json(tmp_path / "chats.jsonl", "messages", CHATS)))
    text = load_text(data, "evaluation", tokenizer())
    windows = evaluation_windows("chats", text, tokenizer(), 16, None)
    whole = "".join(tokenizer().apply_chat_template(chat, tokenize=False) for chat in CHATS)
    ids = tokenizer()(whole, add_special_tokens=False)["input_ids"]
    assert windows.flatten().tolist() == ids[: windows.size]
    assert windows.size > len(ids) - 16


def test_short_conversations_are_joined(tmp_path: Path) -> None:
    """Where none is longer than a window; the store says so."""
    data = DataConfig(name=str(write_json(tmp_path / "chats.jsonl", "messages", CHATS)))
    text = load_text(data, "calibration", tokenizer())
    spec, _ = draw_samples("chats", text, tokenizer(), 3, 400, 0)
    assert spec.sampling == "chat joined"


def test_text_is_taken_before_messages(tmp_path: Path) -> None:
    """A table with both is text, as ever; asked for, its messages are taken."""
    path = tmp_path / "both.jsonl"
    path.write_text(json.dumps({"text": "the fox", "messages": CHATS[0]}) + "\n")
    plain = load_text(DataConfig(name=str(path)), "calibration", tokenizer())
    assert (plain.is_chat, [*plain.documents]) == (False, ["the fox"])
    chat = load_text(DataConfig(name=str(path), text_column="messages"), "calibration", tokenizer())
    assert (chat.is_chat, chat.documents[0].count("assistant: ")) == (True, 1)


def test_text_that_is_asked_for_is_not_something_else(tmp_path: Path) -> None:
    """Conversations are looked for only where no column was named."""
    path = write_json(tmp_path / "chats.jsonl", "messages", CHATS)
    with pytest.raises(InputError, match="no text column 'text'; it has id, messages"):
        load_text(DataConfig(name=str(path), text_column="text"), "calibration", tokenizer())


def test_a_folder_s_conversations_are_all_its_files(tmp_path: Path) -> None:
    """In the order of their names, numbered through."""
    write_parquet(tmp_path / "b.parquet", "conversations", SHAREGPT[3:])
    write_json(tmp_path / "a.jsonl", "messages", CHATS[:3])
    (tmp_path / "c.jsonl").write_text("")
    text = load_text(DataConfig(name=str(tmp_path)), "calibration", tokenizer())
    expected = [tokenizer().apply_chat_template(chat, tokenize=False) for chat in CHATS]
    assert [*text.documents] == expected
    assert [text.documents[n] for n in range(6)] == expected


def test_a_folder_of_conversations_and_text_is_refused(tmp_path: Path) -> None:
    """They are joined in different ways."""
    write_json(tmp_path / "a.jsonl", "messages", CHATS)
    (tmp_path / "b.txt").write_text("the fox")
    with pytest.raises(InputError, match=r"conversations \(.*a\.jsonl\) and text \(.*b\.txt\)"):
        load_text(DataConfig(name=str(tmp_path)), "calibration", tokenizer())


def test_a_template_that_wants_parts_gets_them() -> None:
    """Those of image-text models drop a content that is a string."""
    assert ChatTemplate(tokenizer(OF_PARTS), "chats").read(CHATS[1]) == "".join(
        f"{m['role']}: {m['content']}" for m in CHATS[1]
    )


def test_what_else_a_message_holds_reaches_the_template() -> None:
    """Tool calls, for one, in place of content; fields that are null do not."""
    template = (
        "{% for m in messages %}{{ m['content'] }}{% if m.tool_calls %}[{{ m.tool_calls }}]"
        "{% endif %}{% if 'name' in m %}!{% endif %}{% endfor %}"
    )
    chat = [
        {"role": "user", "content": "fox", "tool_calls": None, "name": None},
        {"role": "assistant", "content": None, "tool_calls": "jump", "name": None},
    ]
    assert ChatTemplate(tokenizer(template), "chats").read(chat) == "fox[jump]"


def test_rows_of_the_hub_are_read_when_they_are_drawn() -> None:
    """A data set's column is a list of lists of dicts there, as in files."""
    rows = Dataset.from_dict({"messages": CHATS})["messages"]
    read = ChatTemplate(tokenizer(), "chats").read
    assert [read(row) for row in rows] == [
        tokenizer().apply_chat_template(chat, tokenize=False) for chat in CHATS
    ]


def test_a_store_and_an_evaluation_of_chat_data(tmp_path: Path) -> None:
    """The whole way: the store holds the template's tokens, and says how they were drawn."""
    model = save_tiny("llama", tmp_path / "model")
    tokenizer().save_pretrained(model)
    data = DataConfig(name=str(write_json(tmp_path / "chats.jsonl", "messages", CHATS)))
    config = CollectConfig(
        model=str(model), store=tmp_path / "store", data=data, num_samples=4, seq_len=16
    )
    store = collect(config)
    assert store.spec.samples.sampling == "chat document"
    starts = {tuple(given(chat)[n : n + 16]) for chat in CHATS for n in range(len(given(chat)))}
    assert all(tuple(row) in starts for row in np.array(store.input_ids()).tolist())
    again = collect(config)  # nothing to do: the same command finds its store
    assert again.digest == store.digest

    measured = evaluate(EvalConfig(model=str(model), data=data, seq_len=16))
    text = load_text(data, "evaluation", tokenizer())
    assert isinstance(text, Text)
    assert measured.num_windows == len(evaluation_windows("x", text, tokenizer(), 16, None))
