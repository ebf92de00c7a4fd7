"""Pools of reference rows, prepared as the training data is, and the numbers of the training rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from trl_safety.config.block import SafetyConfig
from trl_safety.errors import ConfigurationError

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
    """A method's pool, tokenised as the training data is; `kl` where it is prompts without an answer."""

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
        ConfigurationError: beside the prompt there are columns that nothing reads, of which one may be the answer.
    """
    columns = set(dataset.column_names)
    if "prompt" not in columns or columns & {"completion", "messages", "text", "input_ids", "labels"}:
        return False
    if unread := sorted(columns - {"prompt", ROW}):
        raise ConfigurationError(
            f"{setting}: has prompt, no completion, and {', '.join(unread)}, which nothing reads: rename the answers' column to completion, or "
            "remove the others, so that the prompts alone are held to the starting model by KL"
        )
    return True


def tokenised_prompts(dataset: Dataset, tokenizer: Any, max_length: int | None) -> Dataset:
    """Prompts with the chat template up to where the answer would begin, every token labelled."""

    def tokenise(row: dict[str, Any]) -> dict[str, Any]:
        prompt = row["prompt"]
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
        ids = ids[:max_length]
        return {"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}

    return dataset.map(tokenise, remove_columns=[name for name in dataset.column_names if name != ROW])
