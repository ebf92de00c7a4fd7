"""Data sets that options name by a path or a Hub id, and rows made into tokens where no trainer does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from trl_safety.errors import ConfigurationError

IGNORED = -100


def load_rows(source: str, setting: str) -> Dataset:
    """A data set from a local file (.jsonl, .json, .csv, .parquet), a data set folder, or the Hub.

    Args:
        source: where it is.
        setting: the option that names it, for messages.

    Raises:
        ConfigurationError: it cannot be found or read, or has no rows.
    """
    named = f"{setting} = {source!r}"
    path = Path(source)
    try:
        if path.is_dir():
            loaded = load_from_disk(source) if (path / "state.json").is_file() else load_dataset(source, split="train")
        elif path.suffix in (".jsonl", ".json", ".csv", ".parquet"):
            loaded = load_dataset(path.suffix.removeprefix(".").replace("jsonl", "json"), data_files=source, split="train")
        else:
            loaded = load_dataset(source, split="train")
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{named}: cannot be read ({str(error).splitlines()[0]}); give a .jsonl, .csv or .parquet file, a dataset folder or a Hub id with a train split"
        ) from error
    if isinstance(loaded, DatasetDict) or not len(loaded):
        raise ConfigurationError(f"{named}: has no rows of its own; give one split with at least one row")
    return loaded


def supervised(row: dict[str, Any], tokenizer: Any, max_length: int) -> tuple[list[int], list[int]]:
    """A row's tokens, and its labels: those of the answer, −100 elsewhere.

    Args:
        row: `prompt` and `completion` (texts, or messages), `messages` (the last one is the answer), or `text` (all of it is).
        tokenizer: with a chat template where the row has messages.
        max_length: what is beyond is cut off.

    Raises:
        ConfigurationError: the row has none of these columns.
    """
    if isinstance(row.get("messages"), list):
        row = {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
    if isinstance(row.get("prompt"), list):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False)
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=True, return_dict=False)
    elif "prompt" in row and "completion" in row:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = prompt + tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    elif isinstance(row.get("text"), str):
        prompt, ids = [], tokenizer(row["text"])["input_ids"]
    else:
        raise ConfigurationError(f"the data has the columns {', '.join(row)}: give prompt and completion, messages, or text")
    labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
    return ids[:max_length], labels[:max_length]
