"""Loads data sets that options name by a path or a Hub id, and tokenises rows where no trainer does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetsError

from trl_safety.errors import ConfigurationError, reason
from trl_safety.jsonl import kind_of, read_lines
from trl_safety.messages import WHOLE, ShapeError, conversation, text_of
from trl_safety.rendering import render, text_tokenizer, token_ids

IGNORED = -100

LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz")
FILES = (".json", ".csv", ".parquet")
KINDS = ".jsonl, .jsonl.gz, .json, .csv or .parquet"


def load_rows(source: str, setting: str) -> Dataset:
    """A data set from a local file (`KINDS`), a data set folder, or the Hub.

    Args:
        source: path or Hub id.
        setting: the option that names it, for messages.

    Raises:
        ConfigurationError: it cannot be found or read, or has no rows.
    """
    loaded = _load(source, f"{setting} = {source!r}", split="train")
    if isinstance(loaded, DatasetDict) or not len(loaded):
        raise ConfigurationError(f"{setting} = {source!r}: is not one split with rows; give one split with at least one row")
    return loaded


def load_splits(source: str, setting: str, *, name: str | None = None, streaming: bool = False) -> Mapping[str, Any]:
    """The splits of a data set, by name; a local file is a split called train.

    Args:
        source: as `load_rows` takes it.
        setting: the option that names it, for messages.
        name: the configuration of a data set that has several.
        streaming: do not download all of it.

    Raises:
        ConfigurationError: it cannot be found or read, or a configuration is named for a file.
    """
    loaded = _load(source, f"{setting} = {source!r}", name=name, streaming=streaming)
    if isinstance(loaded, Dataset):
        if name is not None:
            raise ConfigurationError(f"dataset_config = {name!r}: {setting} = {source!r} has no configurations; remove it")
        loaded = {"train": loaded.to_iterable_dataset() if streaming else loaded}
    found: Mapping[str, Any] = loaded
    return found


def _load(source: str, named: str, **options: Any) -> Any:
    path = Path(source)
    try:
        if path.is_dir():
            if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
                saved = load_from_disk(source)
                return saved.get("train", saved) if isinstance(saved, DatasetDict) and options.get("split") else saved
        elif path.name.endswith(LINES) or (path.suffix == ".json" and _is_lines(path)):
            return _from_lines(path, named)
        elif path.suffix in FILES:
            return load_dataset(path.suffix.removeprefix("."), data_files=source, split="train")
        elif path.is_file():
            raise ConfigurationError(f"{named}: is a file of the kind {path.suffix!r}, which is not read; give a {KINDS} file")
        return load_dataset(source, **options)
    except ConfigurationError:
        raise
    except (OSError, ValueError, DatasetsError) as error:
        # What `datasets` says of a file that it cannot read is that it cannot read it.
        why = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ is not None else error
        raise ConfigurationError(
            f"{named}: cannot be read ({reason(why)}); give a {KINDS} file, a dataset folder or a Hub id with a train split"
        ) from error


def _is_lines(path: Path) -> bool:
    """Whether a .json file holds one object per line, not an array of them."""
    with path.open("rb") as file:
        return not file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _from_lines(path: Path, named: str) -> Dataset:
    """The rows of a JSON-lines file. Every row is checked, so that an error names its line."""
    kinds: dict[str, tuple[str, int]] = {}
    rows = []
    for number, row in read_lines(path, named):
        for key, value in row.items():
            kind, first = kinds.setdefault(key, (kind_of(value), number)) if value is not None else ("null", number)
            if value is not None and kind != kind_of(value):
                raise ConfigurationError(
                    f"{named}, line {number}: `{key}` is {kind_of(value)}, but {kind} in line {first}; a column must hold one kind of value"
                )
        try:
            _check_shape(row)
        except ShapeError as error:
            raise ConfigurationError(f"{named}, line {number}: {error}") from error
        rows.append(row)
    # A column need not be in the first row.
    keys = dict.fromkeys(key for row in rows for key in row)
    try:
        return Dataset.from_dict({key: [row.get(key) for row in rows] for key in keys})
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigurationError(f"{named}: its rows make no table ({reason(error)}); give every row the same shape") from error


def _check_shape(row: Mapping[str, Any]) -> None:
    """Check the shape of the columns that hold a conversation, not the contents of its messages."""
    for name in ("prompt", "completion", *WHOLE):
        value = row.get(name)
        if value is None or (isinstance(value, str) and name not in WHOLE):
            continue
        if not isinstance(value, list) or not value:
            raise ShapeError(f"`{name}` is {'an empty list' if value == [] else kind_of(value)}, where text or messages were expected")
        for index, message in enumerate(value):
            if not isinstance(message, dict) or not ({"role", "from"} & message.keys()):
                found = ", ".join(message) if isinstance(message, dict) else kind_of(message)
                raise ShapeError(f"`{name}`[{index}] is {found or 'empty'}, where a message with role and content was expected")
    if (
        isinstance(row.get("prompt"), str | list)
        and row.get("completion") is not None
        and type(row["prompt"]) is not type(row["completion"])
    ):
        raise ShapeError("prompt and completion are not of one kind: give both as text, or both as messages")


def check_columns(columns: Sequence[str] | None, named: str, text: str = "text") -> None:
    """Check that a data set has columns to train on.

    Args:
        columns: its columns; None if they are not known yet.
        named: how the user named it, for messages.
        text: the column of plain text.

    Raises:
        ConfigurationError: it has none of them.
    """
    if columns is None or {"prompt", "completion"} <= set(columns) or {"input_ids", text, *WHOLE} & set(columns):
        return
    raise ConfigurationError(
        f"{named}: has {'the columns ' + ', '.join(columns) if columns else 'no columns'}: give prompt and completion, messages, conversations, {text}, "
        "or input_ids with labels"
    )


def check_filled(data: Any, named: str, text: str = "text") -> None:
    """Check that every row has the columns that it is trained on.

    Args:
        data: a data set; a streamed one is not checked.
        named: how the user named it, for messages.
        text: the column of plain text.

    Raises:
        ConfigurationError: a row lacks one; the message names the first such row.
    """
    if not isinstance(data, Dataset):
        return
    pair = {"prompt", "completion"} <= set(data.column_names)
    read = ["prompt", "completion"] if pair else [name for name in ("input_ids", *WHOLE, text) if name in data.column_names][:1]
    for name in read:
        # Arrow counts them by itself; the rows are looked at where there are some.
        if (
            data.data.column(name).null_count
            and (row := next((i for i, value in enumerate(data[name]) if value is None), None)) is not None
        ):
            raise ConfigurationError(f"{named}: row {row + 1} of {len(data)} has no {name}; give it one, or remove the row")


def check_tokens(data: Any, named: str, vocabulary: int) -> None:
    """Check that the model knows every token of pre-tokenised rows. On a GPU an unknown token would end the process without a message.

    Args:
        data: a data set; without `input_ids`, or streamed, it is not checked.
        named: how the user named it, for messages.
        vocabulary: the rows of the model's embeddings.

    Raises:
        ConfigurationError: a row holds an unknown token; the message names the first such row.
    """
    if not isinstance(data, Dataset) or "input_ids" not in data.column_names:
        return
    for number, row in enumerate(data["input_ids"], 1):
        if strange := [token for token in row if not isinstance(token, int) or not 0 <= token < vocabulary]:
            raise ConfigurationError(
                f"{named}: row {number} holds the token {strange[0]!r}, and the model has {vocabulary}: the rows are of another tokenizer; make them again"
            )


def splittable(columns: Sequence[str]) -> bool:
    """Whether a row's request and answer can be told apart."""
    return {"prompt", "completion"} <= set(columns) or bool(set(WHOLE) & set(columns))


def supervised(
    row: Mapping[str, Any], tokenizer: Any, max_length: int | None, *, keep_end: bool = False, chat_template: str | None = None
) -> tuple[list[int], list[int]]:
    """A row's tokens and labels: the labels are the answer's tokens, and −100 elsewhere.

    Args:
        row: `prompt` and `completion` (texts, or messages), `messages` or `conversations` (the last turn is the answer), or `text` (all of it is the answer).
        tokenizer: with a chat template where the row has messages; or a processor.
        max_length: longer rows are truncated.
        keep_end: truncate at the beginning instead of the end.
        chat_template: used instead of the tokenizer's.

    Raises:
        ConfigurationError: the row has none of these columns, or the template rejects it.
    """
    words = text_tokenizer(tokenizer)
    if any(row.get(name) is not None for name in ("prompt", *WHOLE)):
        try:
            prompt, answer = conversation(row)
        except ShapeError as error:
            raise ConfigurationError(f"the data: {error}") from error
        if answer is None:
            raise ConfigurationError(
                f"the data has the columns {', '.join(row)} and a row without an answer: give prompt and completion, or messages"
            )
        if isinstance(prompt, str) or isinstance(answer, str):
            begin, whole = str(prompt), f"{prompt}{answer}"
            if words.eos_token and not whole.endswith(words.eos_token):
                whole += words.eos_token
            before, ids = words(begin)["input_ids"], words(whole)["input_ids"]
        else:
            options = _template_options(row, chat_template)
            whole = render((*prompt, *answer), tokenizer, generation=False, **options)
            begin = whole[: _answer_begins(prompt, text_of(answer[0]["content"]), whole, tokenizer, options)]
            before, ids = token_ids(begin, tokenizer), token_ids(whole, tokenizer)
        # A token that spans the boundary belongs to the answer.
        start = _common(before, ids)
    elif isinstance(row.get("text"), str):
        start, ids = 0, words(row["text"])["input_ids"]
    else:
        raise ConfigurationError(f"the data has the columns {', '.join(row)}: give prompt and completion, messages, or text")
    labels = [IGNORED] * start + ids[start:]
    kept = slice(-max_length, None) if keep_end and max_length is not None else slice(max_length)
    return ids[kept], labels[kept]


def _template_options(row: Mapping[str, Any], chat_template: str | None) -> dict[str, Any]:
    tools = row.get("tools")
    own = {key: value for key, value in (row.get("chat_template_kwargs") or {}).items() if value is not None}
    options = {"chat_template": chat_template, "tools": json.loads(tools) if isinstance(tools, str) else tools}
    return {**{key: value for key, value in options.items() if value}, **own}


def _answer_begins(prompt: Any, answer: str, whole: str, tokenizer: Any, options: Mapping[str, Any]) -> int:
    """Where the answer begins in a rendered conversation.

    That is the end of the prompt as rendered for generation. Some templates write more there than before a known answer (an empty
    thinking block). Then it is where the two diverge, but no later than the answer's first character.
    """
    asked = render(prompt, tokenizer, **options)
    if whole.startswith(asked):
        return len(asked)
    earliest = _common(render(prompt, tokenizer, generation=False, **options), whole)
    found = whole.find(answer.strip(), earliest)
    return min(_common(asked, whole), found) if found >= 0 else earliest


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
