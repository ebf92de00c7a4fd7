"""Pools of reference rows, prepared like the training data."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from trl_safety.config.block import SafetyConfig
from trl_safety.errors import ConfigurationError
from trl_safety.messages import ShapeError, conversation
from trl_safety.rendering import render, text_tokenizer, token_ids
from trl_safety.training.data import IGNORED, splittable, supervised
from trl_safety.training.documents import ROW

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class References:
    """A method's pool, tokenised like the training data; `kl` if it holds prompts without answers."""

    rows: Dataset
    kl: bool


def pools(block: SafetyConfig) -> dict[str, str]:
    """The methods of a block that read a pool of references: name → the option that names it, in full."""
    return {name: f"{name}.{options.reads_references}" for name, options in block.methods().items() if options.reads_references}


def prompts_only(dataset: Dataset, setting: str) -> bool:
    """Whether the references are prompts without an answer.

    Raises:
        ConfigurationError: there are other columns that nothing reads, one of which may be the answer.
    """
    columns = set(dataset.column_names)
    if "prompt" not in columns or columns & {"completion", "messages", "conversations", "text", "input_ids", "labels"}:
        return False
    if unread := sorted(columns - {"prompt", ROW}):
        raise ConfigurationError(
            f"{setting}: has prompt, no completion, and {', '.join(unread)}, which nothing reads: rename the answers' column to completion, or "
            "remove the others to hold the prompts alone to the starting model by KL"
        )
    return True


def tokenised_prompts(dataset: Dataset, tokenizer: Any, max_length: int | None, setting: str) -> Dataset:
    """Prompts rendered by the chat template up to where the answer would begin; every token is labelled.

    Raises:
        ConfigurationError: a row is not a prompt, or the template rejects it.
    """

    def tokenise(row: dict[str, Any]) -> dict[str, Any]:
        try:
            prompt, _ = conversation(row)
        except ShapeError as error:
            raise ConfigurationError(f"{setting}: {error}") from error
        text = isinstance(prompt, str)
        ids = (text_tokenizer(tokenizer)(prompt)["input_ids"] if text else token_ids(render(prompt, tokenizer), tokenizer))[:max_length]
        return {"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}

    return _mapped(dataset, tokenise)


def tokenised_answers(
    dataset: Dataset, tokenizer: Any, max_length: int | None, setting: str, *, keep_end: bool = False, chat_template: str | None = None
) -> Dataset:
    """References with only the answer's tokens labelled, whatever the format of the training data; see `supervised`.

    Raises:
        ConfigurationError: a row has no answer, or none within `max_length`, or the template rejects it.
    """

    def tokenise(row: dict[str, Any]) -> dict[str, Any]:
        try:
            ids, labels = supervised(row, tokenizer, max_length, keep_end=keep_end, chat_template=chat_template)
        except ConfigurationError as error:
            raise ConfigurationError(f"{setting}, row {row[ROW]}: {error}") from error
        return {"input_ids": ids, "labels": labels}

    return _mapped(dataset, tokenise).filter(lambda row: any(label != IGNORED for label in row["labels"]))


def check_format(dataset: Dataset, text: str | None, setting: str) -> None:
    """Check that references can be read, and warn if their requests are supervised as well.

    Args:
        dataset: the references.
        text: the column of plain text; None if a function makes the text.
        setting: the option that names them, for messages.

    Raises:
        ConfigurationError: they have no column that references are read from, or hold tokens without labels.
    """
    columns = [name for name in dataset.column_names if name != ROW]
    if splittable(columns):
        return
    if "input_ids" in columns:
        if not {"labels", "completion_mask", "assistant_masks"} & set(columns):
            raise ConfigurationError(
                f"{setting}: has input_ids without labels, so its requests would be trained as well: add labels that are -100 outside the answer, or give "
                "prompt and completion"
            )
        return
    if text is not None and text not in columns:
        raise ConfigurationError(
            f"{setting}: has the columns {', '.join(columns)}, none of which references are read from: give prompt and completion, messages, conversations, prompt "
            f"alone, or {text}, whatever the format of the training data"
        )
    logger.warning(
        "%s: holds plain text, in which request and answer cannot be told apart: the requests are supervised as well; give prompt and completion to train "
        "only the answers",
        setting,
    )


def _mapped(dataset: Dataset, tokenise: Any) -> Dataset:
    return dataset.map(tokenise, remove_columns=[name for name in dataset.column_names if name != ROW])
