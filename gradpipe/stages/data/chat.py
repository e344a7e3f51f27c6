"""Conversations: rows of messages, made into text by the tokenizer's own chat template.

What: `{"role": …, "content": …}`, as most chat data sets have it, or ShareGPT's `{"from": …,
"value": …}`; content is a string, or a list of parts of type `text`.
Why: a model that was trained on conversations meets its weights' true inputs only between the marks
of its template, which also sets the special tokens: the text is tokenised without adding any.
"""

from typing import Any

from gradpipe.errors import InputError, one_line
from gradpipe.stages.data.documents import OddValueError, Reader, check_characters

CHAT_COLUMNS = ("messages", "conversations")  # looked for in this order

_SHAREGPT = {  # its names of roles, and those of templates
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}

_OWN_KEYS = ("role", "content", "from", "value")
Message = dict[str, Any]


class ChatTemplate(Reader):
    """Makes text of a conversation."""

    is_chat = True
    expected = "messages, each with role and content, or from and value"

    def __init__(self, tokenizer: Any, dataset: str) -> None:
        """InputError if the tokenizer has no template."""
        self._tokenizer = tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"dataset {dataset} holds conversations, and the model's tokenizer has no chat "
                "template: copy chat_template.jinja from the model that was trained on it, or "
                "give text (--text-column)"
            )

    def check(self, value: object) -> list[Message]:
        """The messages of a row; OddValueError says what is wrong with it."""
        if not isinstance(value, list):
            raise OddValueError(f"holds {type(value).__name__}")
        if not value:
            raise OddValueError("holds no message")
        return [_message(number, message) for number, message in enumerate(value, 1)]

    def read(self, value: object) -> str:
        """The text of a row; OddValueError says what is wrong with it.

        Templates of models that also see images want parts, and may drop a content that is a
        string: they get parts where no message would be left.
        """
        messages = self.check(value)
        for asked in (messages, [_in_parts(message) for message in messages]):
            text = self._rendered(asked)
            said = [message["content"].strip() for message in messages]
            if not any(said) or any(words in text for words in said if words):
                return text
        raise OddValueError("holds messages that the model's chat template leaves out")

    def _rendered(self, messages: list[Message]) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=False
            )
        except Exception as error:  # templates raise what their authors like
            reason = one_line(error)
            raise OddValueError(
                f"holds what the model's chat template refuses ({reason})"
            ) from error
        return text


def _message(number: int, message: object) -> Message:
    """One message with `role` and `content`, and what else a template may read, as tool calls."""
    if not isinstance(message, dict):
        raise OddValueError(f"holds {type(message).__name__} as message {number}")
    role, content = message.get("role"), message.get("content")
    if role is None:
        role = _SHAREGPT.get(str(message.get("from")))
        content = message.get("value")
    if not isinstance(role, str):
        raise OddValueError(f"holds message {number} of nobody (its keys: {', '.join(message)})")
    others = {k: x for k, x in message.items() if x is not None and k not in _OWN_KEYS}
    if content is None and others.get("tool_calls"):
        content = ""
    return {**others, "role": role, "content": _content(number, content)}


def _content(number: int, content: object) -> str:
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if not all(isinstance(part, dict) for part in parts):
        raise OddValueError(f"holds message {number} with parts that are no objects")
    if others := [part.get("type") for part in parts if part.get("type") != "text"]:
        raise OddValueError(f"holds message {number} with a part of type {others[0]}, not text")
    texts: list[Any] = [part.get("text") for part in parts]
    if odd := [text for text in texts if not isinstance(text, str)]:
        raise OddValueError(f"holds message {number} whose content is {type(odd[0]).__name__}")
    text = "".join(texts)
    check_characters(text)
    return text


def _in_parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}
