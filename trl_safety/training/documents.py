"""The documents of the training data: which row of the user's data set each one is, and where it lies in a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from trl_safety.adapters.documents import Documents, Place, Rows, Stretches
from trl_safety.errors import ConfigurationError

ROW = "safety_row"
"""Column of the training and reference data with the row of the user's data set; in packed rows a list, one entry per document."""

PART = "safety_part"
"""Column of packed rows: which part of its row of the user's data set each document is, from 0."""

PLACES = "safety_places"
"""Entry of a batch whose rows hold several documents: (n, 4), the part, and the row, start and length of the document in the batch."""

LENGTHS = "seq_lengths"
"""TRL's column of packed rows with the lengths of their documents."""


@dataclass(frozen=True)
class Document:
    """One document of the training data: a part of a row of the user's data set, and its number of tokens."""

    row: int
    part: int
    length: int


def documents_of(example: Mapping[str, Any]) -> list[Document]:
    """The documents of one example of the training data, in order."""
    lengths = example.get(LENGTHS)
    lengths = [len(example.get("input_ids", ()))] if lengths is None else [int(length) for length in lengths]
    rows = example[ROW] if isinstance(example[ROW], Sequence) else [example[ROW]] * len(lengths)
    parts = example[PART] if PART in example else range(len(lengths))
    return [Document(*found) for found in zip(rows, parts, lengths, strict=True)]


class RowCollator:
    """The trainer's collator; it also records which rows of the user's data set a batch holds, and where their documents are.

    It takes the examples of the collators of TRL (plain, padding-free, packed), Transformers (flattening) and Axolotl (sample packing,
    with one list of examples per row).
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[Any]) -> Any:
        """The inner collator's batch with `ROW` (n,), and with `PLACES` where documents share a row.

        Raises:
            ConfigurationError: documents share a row, and the inner collator has moved their tokens.
        """
        nested = bool(examples) and isinstance(examples[0], list)
        rows = list(examples) if nested else [[example] for example in examples]
        if not rows or any(ROW not in example for row in rows for example in row):
            return self.collator(examples)
        documents = [[found for example in row for found in documents_of(example)] for row in rows]
        bare = [[{key: value for key, value in example.items() if key not in (ROW, PART)} for example in row] for row in rows]
        batch = self.collator(bare if nested else [example for row in bare for example in row])
        batch[ROW] = torch.tensor([found.row for row in documents for found in row])
        ids = batch["input_ids"]
        if len(batch[ROW]) > len(ids):
            if len(ids) == 1:
                rows, documents = [[example for row in rows for example in row]], [[found for row in documents for found in row]]
            batch[PLACES] = torch.tensor(list(_places(ids, rows, documents)))
        return batch


def _places(ids: Tensor, rows: list[list[Any]], documents: list[list[Document]]) -> Iterator[tuple[int, int, int, int]]:
    width = ids.shape[1]
    for row, (examples, found) in enumerate(zip(rows, documents, strict=True)):
        own = torch.cat([torch.as_tensor(example["input_ids"]).long() for example in examples])
        # Padded on either side.
        begin = next((at for at in (0, width - len(own)) if at >= 0 and torch.equal(ids[row, at : at + len(own)], own)), None)
        if begin is None:
            raise ConfigurationError(
                "the data collator puts several documents into one row and moves or changes their tokens, so that the documents cannot be found again: use "
                "the trainer's own collator, or one document a row"
            )
        for document, start in zip(found, accumulate((document.length for document in found), initial=begin), strict=False):
            yield document.part, row, start, document.length


def take_documents(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Documents]:
    """Take the documents' entries out of a batch, leaving the model's inputs. If they share rows, no label crosses from one to the next.

    Returns:
        (n,) rows of the user's data set; (n,) parts of these; where the documents lie.

    Raises:
        ConfigurationError: the batch does not say which rows it holds.
    """
    rows, places = inputs.pop(ROW, None), inputs.pop(PLACES, None)
    if rows is None:
        raise ConfigurationError(
            f"the batches lack {ROW!r}: the trainer's data collator or data loader was replaced after the trainer was made; set it before"
        )
    if places is None:
        return rows, torch.zeros_like(rows), Rows(len(rows))
    labels = inputs["labels"] = inputs["labels"].clone()
    # It would be predicted from the last token of the document before. TRL does the same, Axolotl does not.
    labels[places[:, 1], places[:, 2]] = -100
    shape = (labels.shape[0], labels.shape[1])
    return rows, places[:, 0], Stretches([Place(*place) for place in places[:, 1:].tolist()], shape)


def with_rows(dataset: Any, setting: str) -> Dataset:
    """The data set with an added column of row numbers.

    Raises:
        ConfigurationError: it is streamed, so its rows cannot be numbered or read repeatedly.
    """
    if not isinstance(dataset, Dataset):
        raise ConfigurationError(
            f"{setting} is a {type(dataset).__name__}, whose rows cannot be counted and read again; give a datasets.Dataset (load "
            "without streaming)"
        )
    return dataset if ROW in dataset.column_names else dataset.add_column(ROW, list(range(len(dataset))))


def number_rows(trainer: Any) -> None:
    """Add the row numbers of the training data to its batches.

    Raises:
        ConfigurationError: the training data is streamed.
    """
    trainer.train_dataset = with_rows(trainer.train_dataset, "train_dataset")
    if trainer._signature_columns is None:
        trainer._set_signature_columns_if_needed()
    trainer._signature_columns += [ROW, PART]
    trainer.data_collator = RowCollator(trainer.data_collator)


def used_columns(trainer: Any, dataset: Dataset) -> Dataset:
    """What the trainer's model and collator take of a data set, once `number_rows` has been called.

    The trainer's own `_remove_unused_columns` asks for the columns again, which Axolotl's answers only once beside packed rows.
    """
    if not trainer.args.remove_unused_columns:
        return dataset
    return dataset.select_columns([name for name in dataset.column_names if name in trainer._signature_columns])


def number_tokens(dataset: Dataset) -> Dataset:
    """Tokenised rows with their numbers repeated for every token, which packing then cuts and joins like the tokens."""
    dataset = dataset.map(_numbered_tokens, batched=True, desc="Numbering the tokens")
    return dataset.select_columns([name for name in dataset.column_names if name in ("input_ids", "labels", ROW, PART)])


def _numbered_tokens(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    lengths = [len(ids) for ids in batch["input_ids"]]
    return {
        ROW: [[row] * length for row, length in zip(batch[ROW], lengths, strict=True)],
        PART: [list(range(length)) for length in lengths],
    }


def number_documents(packed: Dataset, max_length: int) -> Dataset:
    """Packed rows of `number_tokens` with one number per document.

    Args:
        packed: with TRL's column of the documents' lengths.
        max_length: the length at which longer rows were cut.
    """
    return packed.map(_numbered_documents, batched=True, fn_kwargs={"max_length": max_length}, desc="Numbering the documents")


def _numbered_documents(batch: dict[str, list[Any]], max_length: int) -> dict[str, list[Any]]:
    starts = [list(accumulate(lengths[:-1], initial=0)) for lengths in batch[LENGTHS]]
    return {
        ROW: [[row[start] for start in found] for row, found in zip(batch[ROW], starts, strict=True)],
        PART: [[part[start] // max_length for start in found] for part, found in zip(batch[PART], starts, strict=True)],
    }


def texts(dataset: Dataset, wanted: set[tuple[int, int]], tokenizer: Any) -> dict[tuple[int, int], str]:
    """The text of some documents of the training data, by row and part."""
    own = [name for name in (ROW, PART, LENGTHS, "input_ids") if name in dataset.column_names]
    found = {}
    for example in dataset.select_columns(own):
        start = 0
        for document in documents_of(example):
            if (document.row, document.part) in wanted:
                found[document.row, document.part] = tokenizer.decode(example["input_ids"][start : start + document.length])
            start += document.length
    return found
