"""`trl-safety adopt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trl_safety.cli.base import app, errors


@app.command()
def adopt(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of a LoRA adapter that someone else trained.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the adapter with its record.", show_default=False)],
    kind: Annotated[str, typer.Option("--as", help="What it is: buffer or reinforce.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="The model it was trained on; later uses are checked against it.")] = None,
) -> None:
    """Adopt a buffer or a ReinforceLoRA that someone else trained. It is copied, never changed."""
    with errors():
        from trl_safety.adapters.adopt import adopt as take_in

        checked = take_in(adapter, output, kind, model)
        typer.echo(f"{output}: a {kind} adapter; base model: {checked}")
