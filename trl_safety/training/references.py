"""Pools of reference rows, prepared as the training data is, and the numbers of the training rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from trl_safety.config.block import SafetyConfig
from trl_safety.errors import ConfigurationError
from trl_safety.messages import ShapeError, conversation
from trl_safety.rendering import render, text_tokenizer, token_ids
from trl_safety.training.data import IGNORED, splittable, supervised

logger = logging.getLogger(__name__)

ROW = "safety_row"
"""Column of the training and reference data that says which row of the user's data set a sample is."""


class RowCollator:
    """The trainer's collator, which carries the samples' row numbers along."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Any:
        """The inner collator's batch, with the row numbers of the examples that have one."""
        rows = [example[ROW] for example in examples if ROW in example]
        batch = self.collator([{key: value for key, value in example.items() if key != ROW} for example in examples])
        if rows:
            batch[ROW] = torch.tensor(rows)
        return batch


def with_rows(dataset: Any, setting: str) -> Dataset:
    """A data set with the number of every row in a column of its own.

    Raises:
        ConfigurationError: it is streamed, so that its rows have no numbers and it cannot be read again and again.
    """
    if not isinstance(dataset, Dataset):
        raise ConfigurationError(
            f"{setting} is a {type(dataset).__name__}: rows must be such that they can be counted and read again; give a datasets.Dataset (load "
            "without streaming)"
        )
    return dataset if ROW in dataset.column_names else dataset.add_column(ROW, list(range(len(dataset))))


@dataclass(frozen=True)
class References:
    """A method's pool, tokenised like the training data; `kl` if it holds prompts without answers."""

    rows: Dataset
    kl: bool


def pools(block: SafetyConfig) -> dict[str, str]:
    """The methods of a block that read a pool of references: name → the option that names it, in full."""
    return {name: f"{name}.{options.reads_references}" for name, options in block.methods().items() if options.reads_references}


def number_rows(trainer: Any) -> None:
    """Have the batches say which rows of the training data they hold.

    Raises:
        ConfigurationError: the training data is streamed.
    """
    trainer.train_dataset = with_rows(trainer.train_dataset, "train_dataset")
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns.append(ROW)
    trainer.data_collator = RowCollator(trainer.data_collator)


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
