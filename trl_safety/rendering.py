"""Prompts as a model sees them: rendered by its chat template, or unchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from trl_safety.answers import answer_of
from trl_safety.errors import ConfigurationError
from trl_safety.messages import Messages, ShapeError, texts_of

TEMPLATE_FAILURES = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
"""What a chat template ends in that does not take a conversation: it is a small program. ValueError: there are several and none is the default."""


def text_tokenizer(given: Any) -> Any:
    """The tokenizer; if a processor was given, the processor's tokenizer."""
    return getattr(given, "tokenizer", given)


def chat_template(given: Any) -> Any:
    """The chat template of a tokenizer or a processor; None if there is none."""
    own = getattr(given, "chat_template", None)
    return own if own is not None else getattr(text_tokenizer(given), "chat_template", None)


def render(messages: Messages | str, given: Any, *, generation: bool = True, **options: Any) -> str:
    """A conversation as the model's template renders it, or a text unchanged.

    Content in parts is joined for a template that takes text; text is put into parts for a template that also takes images.

    Args:
        messages: the conversation, or a text.
        given: tokenizer or processor.
        generation: end the prompt where the answer would begin.
        **options: for the template.

    Raises:
        ConfigurationError: the template rejects the conversation or drops a part of it, or there is no template and more than one message.
    """
    if isinstance(messages, str):
        return messages
    try:
        texts = texts_of(messages)
    except ShapeError as error:
        raise ConfigurationError(f"the prompt {_short(messages)!r}: {error}") from error
    tokenizer, template = text_tokenizer(given), options.pop("chat_template", None) or chat_template(given)
    if template is None:
        if len(messages) > 1:
            raise ConfigurationError(
                f"{_name(tokenizer)} has no chat template, and the prompt {_short(messages)!r} has {len(messages)} messages, which only a template can join; "
                "give the prompt as one text, or a tokenizer with a chat template"
            )
        return texts[0]
    refused: Exception | None = None
    for form in _forms(messages, texts, template):
        try:
            rendered: str = tokenizer.apply_chat_template(
                form,
                chat_template=template if isinstance(template, str) else None,
                add_generation_prompt=generation,
                tokenize=False,
                **options,
            )
        except TEMPLATE_FAILURES as error:
            refused = refused or error
            continue
        if all(_holds(rendered, message, text) for message, text in zip(form, texts, strict=True)):
            return rendered
    roles = [str(message["role"]) for message in messages]
    if refused is not None:
        remedy = (
            "it may not take a system message: put that text into the user's first message"
            if "system" in roles
            else "write the prompts with the roles and turns that it accepts"
        )
        raise ConfigurationError(
            f"the chat template of {_name(tokenizer)} rejects the prompt {_short(messages)!r} ({', '.join(roles)}): {refused}; {remedy}"
        ) from refused
    raise ConfigurationError(
        f"the chat template of {_name(tokenizer)} drops a part of the prompt {_short(messages)!r} ({', '.join(roles)}), so the model would be asked "
        'something else; write the content as the template reads it ("…", or [{"type": "text", "text": "…"}]), or fix the template'
    )


def _forms(messages: Messages, texts: Sequence[str], template: Any) -> list[list[dict[str, Any]]]:
    """The ways to write the same conversation; a template accepts at least one of them."""
    joined = [{**message, "content": text} for message, text in zip(messages, texts, strict=True)]
    in_parts = [{**message, "content": [{"type": "text", "text": text}]} for message, text in zip(messages, texts, strict=True)]
    forms = [joined]
    if any(not isinstance(message["content"], str) for message in messages):
        given = zip(messages, in_parts, strict=True)
        forms.append([part if isinstance(message["content"], str) else dict(message) for message, part in given])
    # Some templates that take images read only parts, and silently skip plain text.
    if "image" in str(template):
        forms.append(in_parts)
    return forms


def _holds(rendered: str, message: Mapping[str, Any], text: str) -> bool:
    """Whether a message's text is in the template's output, up to whitespace, escapes, and the thinking in an earlier answer."""
    if not isinstance(message["content"], str) and str(message["content"]) in rendered:
        return False  # The template printed the Python list.
    written = [text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]]
    if message["role"] == "assistant":
        written.append(answer_of(text) or "")
    flat = _flat(rendered)
    return any(_flat(way) in flat for way in written)


def _flat(text: str) -> str:
    return "".join(text.split())


def _short(messages: Messages) -> str:
    content = messages[-1].get("content")
    text = content if isinstance(content, str) else str(content)
    return text if len(text) <= 60 else text[:60] + "…"


def _name(tokenizer: Any) -> str:
    return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


def token_ids(rendered: str, given: Any) -> list[int]:
    """The token ids of `render`'s output; special tokens are added only if there is no template, which writes them itself."""
    ids: list[int] = text_tokenizer(given)(rendered, add_special_tokens=chat_template(given) is None)["input_ids"]
    return ids
