"""`selection.jsonl`: which samples and references a method chose, and why; and its summary for the user."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from trl_safety.adapters.files import replacing
from trl_safety.errors import ReportError, reason
from trl_safety.jsonl import read_lines, to_lines

SELECTION = "selection.jsonl"

TEXTS = Path("safety") / "selection_texts.jsonl"

MOST_TEXTS = 1000
"""Number of samples whose text is kept beside the log."""


class Choice(BaseModel):
    """One line of the log: a refresh, or one per-device batch of an optimizer step.

    A sample of weight 0 was dropped. A refresh lists only the chosen references. Chosen entries come first, best first.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    step: int
    """The optimizer step, from 1; for a refresh, the step that follows it."""
    kind: Literal["reference", "task"]
    indices: list[int]
    """Row numbers in the user's data set, or in the reference data set, as given to the trainer."""
    parts: list[int] | None = None
    """Which part of its row each sample is, from 0, if rows were cut into several samples or hold several documents."""
    weights: list[float]
    scores: list[float]
    losses: list[float]
    cosines: list[float]

    @property
    def not_finite(self) -> str | None:
        """The first column that holds NaN or infinity, as after training has diverged; None if there is none."""
        return next((name for name, values in self if isinstance(values, list) and not all(map(math.isfinite, values))), None)


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
    """Appends to `OUTPUT_DIR/selection.jsonl`. Lines from steps that a resumed run repeats are removed first."""

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
        """Queue one line; `flush` writes it."""
        self._lines.append(choice)

    def flush(self) -> None:
        """Write the queued lines."""
        if self._lines:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(_line(choice) for choice in self._lines))
            self._lines = []


def _line(choice: Choice) -> str:
    return choice.model_dump_json(exclude_none=True) + "\n"


def read_choices(path: Path) -> list[Choice]:
    """The lines of a log. An incomplete last line, left by a run that was killed, is dropped.

    Raises:
        ReportError: the file cannot be read, or is not a selection log.
    """
    named = f"{str(path)!r}: is not a readable selection log"
    choices = []
    remedy = "give the output folder of a run that selects samples"
    for number, row in read_lines(path, named, error=ReportError, whole=True, remedy=remedy):
        try:
            choices.append(Choice.model_validate(row))
        except ValidationError as error:
            raise ReportError(f"{named} (line {number}: {reason(error)}); {remedy}") from error
    return choices


def most_dropped(choices: Iterable[Choice], texts: Mapping[tuple[int, int], str] | None = None) -> list[Dropped]:
    """The training samples, sorted by the share of times they were dropped, then by mean score; highest first.

    Batches whose numbers are not finite are left out.

    Args:
        choices: the lines of a log.
        texts: the samples' text, by row and part.
    """
    rows: dict[tuple[int, int], list[tuple[float, float, float, float]]] = {}
    for choice in choices:
        if choice.kind == "task" and choice.not_finite is None:
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
    """The most-dropped rows of a run, with their text if the run kept it.

    Raises:
        ReportError: the folder has no selection log, or one in which no sample was scored, or one with values that are not finite.
    """
    folder = Path(folder)
    choices = read_choices(folder / SELECTION)
    for choice in choices:
        if (column := choice.not_finite) is not None:
            raise ReportError(
                f"{str(folder / SELECTION)!r}: {column} of optimizer step {choice.step} hold NaN or infinity: the training diverged there. To see "
                "what was chosen before, remove the lines of that step and of those after it"
            )
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
