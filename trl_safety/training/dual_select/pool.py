"""DualSelect's reference pool, and the row numbers of the training data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset

from trl_safety.errors import ConfigurationError
from trl_safety.messages import ShapeError, conversation
from trl_safety.rendering import render, text_tokenizer, token_ids
from trl_safety.training.data import IGNORED, load_rows, splittable, supervised

logger = logging.getLogger(__name__)

POOL = "dual_select.reference_dataset"

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
            f"{setting} is a {type(dataset).__name__}: dual_select needs rows that can be counted and read again; give a datasets.Dataset (load "
            "without streaming)"
        )
    return dataset if ROW in dataset.column_names else dataset.add_column(ROW, list(range(len(dataset))))


def load_references(source: str) -> Dataset:
    """The reference data set behind `dual_select.reference_dataset`; see `load_rows`."""
    return load_rows(source, POOL)


def prompts_only(dataset: Dataset) -> bool:
    """Whether the references are prompts without an answer.

    Raises:
        ConfigurationError: beside the prompt there are columns that nothing reads, of which one may be the answer.
    """
    columns = set(dataset.column_names)
    if "prompt" not in columns or columns & {"completion", "messages", "conversations", "text", "input_ids", "labels"}:
        return False
    if unread := sorted(columns - {"prompt", ROW}):
        raise ConfigurationError(
            f"dual_select.reference_dataset: has prompt, no completion, and {', '.join(unread)}, which nothing reads: rename the answers' column to completion, or "
            "remove the others, so that the prompts alone are held to the starting model by KL"
        )
    return True


def tokenised_prompts(dataset: Dataset, tokenizer: Any, max_length: int | None) -> Dataset:
    """Prompts with the chat template up to where the answer would begin, every token labelled.

    Raises:
        ConfigurationError: a row is no prompt, or the template does not take it.
    """

    def tokenise(row: dict[str, Any]) -> dict[str, Any]:
        try:
            prompt, _ = conversation(row)
        except ShapeError as error:
            raise ConfigurationError(f"{POOL}: {error}") from error
        text = isinstance(prompt, str)
        ids = (text_tokenizer(tokenizer)(prompt)["input_ids"] if text else token_ids(render(prompt, tokenizer), tokenizer))[:max_length]
        return {"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}

    return _mapped(dataset, tokenise)


def tokenised_answers(
    dataset: Dataset, tokenizer: Any, max_length: int | None, *, keep_end: bool = False, chat_template: str | None = None
) -> Dataset:
    """References with the answer's tokens labelled and no other, whatever the format of the training data; see `supervised`.

    Raises:
        ConfigurationError: a row has no answer, or none within `max_length`, or the template does not take it.
    """

    def tokenise(row: dict[str, Any]) -> dict[str, Any]:
        try:
            ids, labels = supervised(row, tokenizer, max_length, keep_end=keep_end, chat_template=chat_template)
        except ConfigurationError as error:
            raise ConfigurationError(f"{POOL}, row {row[ROW]}: {error}") from error
        return {"input_ids": ids, "labels": labels}

    return _mapped(dataset, tokenise).filter(lambda row: any(label != IGNORED for label in row["labels"]))


def check_format(dataset: Dataset, text: str | None) -> None:
    """See that references can be read, and say where their requests are supervised as well.

    Args:
        dataset: the references.
        text: the column of plain text; None where a function makes the text.

    Raises:
        ConfigurationError: they have no column that references are read from, or are tokens of which nobody knows which are the answer's.
    """
    columns = [name for name in dataset.column_names if name != ROW]
    if splittable(columns):
        return
    if "input_ids" in columns:
        if not {"labels", "completion_mask", "assistant_masks"} & set(columns):
            raise ConfigurationError(
                f"{POOL}: has input_ids without labels, so that its requests would be trained as well: add labels with -100 where the answer is not, or give prompt "
                "and completion"
            )
        return
    if text is not None and text not in columns:
        raise ConfigurationError(
            f"{POOL}: has the columns {', '.join(columns)}, of which references are read from none: give prompt and completion, messages, conversations, prompt "
            f"alone, or {text}, whatever the format of the training data"
        )
    logger.warning(
        "%s: holds plain text, in which request and answer cannot be told apart: the requests are supervised as well; give prompt and completion to train the "
        "answers alone",
        POOL,
    )


def _mapped(dataset: Dataset, tokenise: Any) -> Dataset:
    return dataset.map(tokenise, remove_columns=[name for name in dataset.column_names if name != ROW])
