"""`selection.jsonl`: which samples and references a method chose, and why; and what a user reads from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from trl_safety.adapters.files import replacing
from trl_safety.errors import ReportError
from trl_safety.jsonl import read_lines, to_lines

SELECTION = "selection.jsonl"

TEXTS = Path("safety") / "selection_texts.jsonl"

MOST_TEXTS = 1000
"""Samples whose text is kept beside the log."""


class Choice(BaseModel):
    """One line of the log: a refresh, or one per-device batch of an optimizer step.

    A sample of weight 0 was dropped. Of a refresh only the chosen references are listed. Chosen ones come first, best first.
    """

    model_config = ConfigDict(extra="forbid")

    step: int
    """The optimizer step, from 1; of a refresh, the step before which it happened."""
    kind: Literal["reference", "task"]
    indices: list[int]
    """Rows of the user's data set, or of the reference data set, as it was given to the trainer."""
    parts: list[int] | None = None
    """Which part of its row each sample is, from 0, where rows were cut into several samples, or given with several documents in each."""
    weights: list[float]
    scores: list[float]
    losses: list[float]
    cosines: list[float]


class Dropped(BaseModel):
    """One row of the training data over the whole run, or one part of a row that holds several samples."""

    row: int
    part: int = 0
    seen: int
    dropped: int
    mean_score: float
    mean_loss: float
    mean_cosine: float
    text: str | None = None


class SelectionLog:
    """Appends to `OUTPUT_DIR/selection.jsonl`. What lies there from steps that a resumed run repeats is removed first."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / SELECTION
        self._lines: list[Choice] = []

    def start(self, step: int) -> None:
        """Keep the lines up to `step`."""
        kept = [line for line in read_choices(self.path) if line.step <= step] if step and self.path.is_file() else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path, error=ReportError, setting="output_dir") as temporary:
            temporary.write_text("".join(_line(choice) for choice in kept), encoding="utf-8")

    def add(self, choice: Choice) -> None:
        """Note one line; `flush` writes it."""
        self._lines.append(choice)

    def flush(self) -> None:
        """Write what was noted."""
        if self._lines:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(_line(choice) for choice in self._lines))
            self._lines = []


def _line(choice: Choice) -> str:
    return choice.model_dump_json(exclude_none=True) + "\n"


def read_choices(path: Path) -> list[Choice]:
    """The lines of a log. A last line without its end, of a run that was killed, is left out.

    Raises:
        ReportError: the file cannot be read, or is no selection log.
    """
    named = f"{str(path)!r}: is no selection log that can be read"
    choices = []
    remedy = "give the output folder of a run that selects samples"
    for number, row in read_lines(path, named, error=ReportError, whole=True, remedy=remedy):
        try:
            choices.append(Choice.model_validate(row))
        except ValidationError as error:
            raise ReportError(f"{named} (line {number}: {str(error).splitlines()[0]}); {remedy}") from error
    return choices


def most_dropped(choices: Iterable[Choice], texts: Mapping[tuple[int, int], str] | None = None) -> list[Dropped]:
    """The training samples by how often they were dropped when seen, then by their mean score, highest first.

    Args:
        choices: of a log.
        texts: the samples' text, by row and part.
    """
    rows: dict[tuple[int, int], list[tuple[float, float, float, float]]] = {}
    for choice in choices:
        if choice.kind == "task":
            parts = choice.parts or [0] * len(choice.indices)
            for index, part, *values in zip(
                choice.indices, parts, choice.weights, choice.scores, choice.losses, choice.cosines, strict=True
            ):
                rows.setdefault((index, part), []).append((values[0], values[1], values[2], values[3]))
    table = []
    for (row, part), seen in rows.items():
        count = len(seen)
        table.append(
            Dropped(
                row=row,
                part=part,
                seen=count,
                dropped=sum(weight == 0 for weight, *_ in seen),
                mean_score=sum(values[1] for values in seen) / count,
                mean_loss=sum(values[2] for values in seen) / count,
                mean_cosine=sum(values[3] for values in seen) / count,
                text=(texts or {}).get((row, part)),
            )
        )
    return sorted(table, key=lambda entry: (-entry.dropped / entry.seen, -entry.mean_score))


def write_texts(folder: Path, texts: Mapping[tuple[int, int], str]) -> None:
    """Keep the text of training samples beside the log, by row and part."""
    (folder / TEXTS).parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder / TEXTS, error=ReportError, setting="output_dir") as temporary:
        temporary.write_text(to_lines(_with_text(*place, text) for place, text in texts.items()), encoding="utf-8")


def _with_text(row: int, part: int, text: str) -> dict[str, int | str]:
    return {"row": row, **({"part": part} if part else {}), "text": text}


def read_selection(folder: str | Path) -> list[Dropped]:
    """The most-dropped rows of a run, with their text where the run kept it.

    Raises:
        ReportError: the folder has no selection log, or one in which no sample was scored.
    """
    folder = Path(folder)
    choices = read_choices(folder / SELECTION)
    texts: dict[tuple[int, int], str] = {}
    if (folder / TEXTS).is_file():
        named = f"{str(folder / TEXTS)!r}"
        for number, entry in read_lines(folder / TEXTS, named, error=ReportError):
            row, part, text = entry.get("row"), entry.get("part", 0), entry.get("text")
            if not isinstance(row, int) or not isinstance(part, int) or not isinstance(text, str):
                raise ReportError(
                    f"{named}, line {number}: has no row and text; remove the file, and the rows are shown without their text"
                )
            texts[row, part] = text
    table = most_dropped(choices, texts)
    if not table:
        raise ReportError(f"{str(folder / SELECTION)!r}: no sample was scored; the run ended in its warm-up")
    return table


def write_selection(rows: list[Dropped], path: Path) -> None:
    """Write the table as JSON.

    Raises:
        ReportError: the file cannot be written.
    """
    with replacing(path, error=ReportError, setting="json") as temporary:
        temporary.write_text(json.dumps([row.model_dump() for row in rows], indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
