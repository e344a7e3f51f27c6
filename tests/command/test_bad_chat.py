"""Chat data that cannot be used: the file, the row and what is wrong with it, in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.workplace import COLLECT, EVAL, Refused

SAID = {"role": "user", "content": "the quick brown fox jumps over the lazy dog " * 9}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'judge' %}{{ raise_exception('no judges here') }}"
    "{% endif %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
)
SILENT = "{% for m in messages %}{{ m['role'] }}{% endfor %}"


@pytest.fixture
def chatting(workplace: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Gives a copy of the model with a chat template."""

    def copy(template: str) -> Path:
        model = tmp_path / "model"
        shutil.copytree(workplace / "model", model)
        (model / "chat_template.jinja").write_text(template)
        return model

    return copy


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (None, "row 2 holds NoneType under 'messages'"),
        ("the fox", "row 2 holds str"),
        ([], "row 2 holds no message"),
        (["the fox"], "row 2 holds str as message 1"),
        ([SAID, {"content": "fox"}], "row 2 holds message 2 of nobody (its keys: content)"),
        ([{"from": "narrator", "value": "fox"}], "row 2 holds message 1 of nobody"),
        ([{"role": "user"}], "row 2 holds message 1 whose content is NoneType"),
        ([{"role": "user", "content": 7}], "row 2 holds message 1 whose content is int"),
        ([{"role": "user", "content": ["fox"]}], "row 2 holds message 1 with parts that are no"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}],
            "row 2 holds message 1 with a part of type image, not text",
        ),
        ([{"role": "user", "content": "\ud800"}], "row 2 holds half a surrogate pair"),
    ],
)
def test_a_malformed_row_is_named(
    refused: Refused, chatting: Callable[[str], Path], tmp_path: Path, row: Any, says: str
) -> None:
    """Whether it would have been drawn or not."""
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": x}) + "\n" for x in ([SAID], row, [SAID])))
    refused(
        COLLECT.replace("model", str(chatting(TEMPLATE)), 1),
        *("--dataset", path),
        says=(f"dataset {path}: {says}", "expected messages, each with role and content"),
    )


@pytest.mark.parametrize(
    ("template", "role", "says"),
    [
        (TEMPLATE, "judge", "holds what the model's chat template refuses (no judges here)"),
        (SILENT, "user", "holds messages that the model's chat template leaves out"),
        ("{% for %}", "user", "holds what the model's chat template refuses ("),
    ],
)
def test_what_the_template_does_not_take_is_named(
    refused: Refused,
    chatting: Callable[[str], Path],
    tmp_path: Path,
    template: str,
    role: str,
    says: str,
) -> None:
    """Its own words, and the row."""
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [{**SAID, "role": role}]}) + "\n")
    refused(
        EVAL.replace("model", str(chatting(template)), 1),
        *("--dataset", path),
        says=(f"dataset {path}: row 1 {says}",),
    )


@pytest.mark.parametrize("command", [COLLECT, EVAL])
def test_a_tokenizer_without_a_template_is_told(
    refused: Refused, tmp_path: Path, command: str
) -> None:
    """A base model has none; conversations are not made up into text."""
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [SAID]}) + "\n")
    says = (f"dataset {path} holds conversations", "no chat template", "chat_template.jinja")
    refused(command, "--dataset", path, says=says)


def test_a_later_row_without_the_column_is_named(
    refused: Refused, chatting: Callable[[str], Path], tmp_path: Path
) -> None:
    """The column is the first row's."""
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [SAID]}) + "\n" + json.dumps({"prompt": "fox"}) + "\n")
    refused(
        COLLECT.replace("model", str(chatting(TEMPLATE)), 1),
        *("--dataset", path),
        says=("has no text column 'messages'", "it has prompt", "--text-column"),
    )
