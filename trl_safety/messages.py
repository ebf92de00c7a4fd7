"""The formats in which people store conversations: chat messages, OpenAI's `messages`, ShareGPT's `conversations`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl_safety.jsonl import kind_of

Messages = tuple[dict[str, Any], ...]

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model", "assistant", "function_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
"""ShareGPT's role names → ours."""

WHOLE = ("messages", "conversations")
"""Columns that hold a whole conversation, whose last turn may be the answer."""


class ShapeError(ValueError):
    """What was found instead of a conversation. Callers that know the file and line put them before the message."""


def as_messages(value: Any, named: str) -> Messages:
    """Messages with `role` and `content`, from messages in that form or with ShareGPT's `from` and `value`.

    Args:
        value: a list of messages.
        named: the key that holds it, for messages.

    Raises:
        ShapeError: it is not a list of messages, or a message's content is not text.
    """
    if not isinstance(value, list | tuple):
        raise ShapeError(f"`{named}` is {kind_of(value)}, where text or a list of messages was expected")
    if not value:
        raise ShapeError(f"`{named}` is an empty list")
    return tuple(_message(message, f"`{named}`[{index}]") for index, message in enumerate(value))


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ShapeError(f"{where} is {kind_of(message)}, where a message with role and content was expected")
    # A data set with mixed formats has every key in every row, with null for the unused ones.
    given = {key: value for key, value in message.items() if value is not None}
    if "from" in given and "value" in given:
        role = ROLES.get(str(given.pop("from")).lower())
        if role is None:
            raise ShapeError(f"{where} is from {message['from']!r}, which is none of {', '.join(ROLES)}")
        given = {"role": role, "content": given.pop("value"), **given}
    if not isinstance(given.get("role"), str) or "content" not in given:
        raise ShapeError(f"{where} has {', '.join(message) or 'nothing'}, where role and content (or from and value) were expected")
    text_of(given["content"], where)
    return given


def text_of(content: Any, where: str = "a message") -> str:
    """A message's text: the content itself, or its text parts, one per line.

    Raises:
        ShapeError: the content, or one of its parts, is not text.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple) or not content:
        raise ShapeError(f"{where} has {'an empty list' if content == [] else kind_of(content)} as content, where text was expected")
    return "\n".join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else kind_of(part)
    if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
        raise ShapeError(f"{where} has a part of type {kind!r}, but prompts must be text: remove the prompt, or describe the part in words")
    return str(part["text"])


def conversation(row: Mapping[str, Any]) -> tuple[Messages | str, Messages | str | None]:
    """A row's prompt and answer, from `prompt` and `completion`, `messages`, or `conversations`, whichever the row has.

    In a whole conversation the answer is the last turn, if that is the assistant's.

    Raises:
        ShapeError: the row has no prompt, or one in another format.
    """
    if row.get("prompt") is not None:
        asked = row["prompt"]
        prompt = asked if isinstance(asked, str) else as_messages(asked, "prompt")
        answer = row.get("completion")
        if isinstance(answer, str) and not isinstance(prompt, str):
            return prompt, ({"role": "assistant", "content": answer},)
        return prompt, as_messages(answer, "completion") if _are_messages(answer) else answer
    for name in WHOLE:
        if row.get(name) is not None:
            messages = as_messages(row[name], name)
            if isinstance(row.get("system"), str) and row["system"].strip() and messages[0]["role"] != "system":
                messages = ({"role": "system", "content": row["system"]}, *messages)
            if messages[-1]["role"] != "assistant":
                return messages, None
            if len(messages) == 1:
                raise ShapeError(f"`{name}` has only the assistant's turn")
            return messages[:-1], messages[-1:]
    raise ShapeError(f"has {', '.join(row) or 'nothing'}")


def _are_messages(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)


def texts_of(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every message's text; see `text_of`."""
    return [text_of(message["content"]) for message in messages]
