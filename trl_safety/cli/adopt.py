"""`trl-safety adopt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def adopt(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of a LoRA adapter that somebody else trained.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A new or empty folder.")],
    kind: Annotated[str, typer.Option("--as", help="What it is: buffer or reinforce.")],
    model: Annotated[str | None, typer.Option(help="The model that it was trained on: later uses are checked against it.")] = None,
) -> None:
    """Take in a buffer or a ReinforceLoRA that somebody else trained."""
    from trl_safety.adapters.adopt import adopt as take_in

    checked = take_in(adapter, output, kind, model)
    typer.echo(f"{output}: a {kind} adapter; base model: {checked}")
