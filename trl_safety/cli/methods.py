"""`trl-safety methods`: every method, what it needs, and what it costs."""

from __future__ import annotations

import typer

from trl_safety.cli.base import app, errors


@app.command()
def methods() -> None:
    """List every method, including those of installed packages: when it acts, what it needs, what it costs, its paper."""
    from rich.console import Console
    from rich.table import Table

    from trl_safety.config.block import known_methods, options_class
    from trl_safety.errors import SafetyError

    table = Table(title="safety: {METHOD: {…}}")
    for heading in ("method", "acts", "needs", "costs", "source"):
        table.add_column(heading, overflow="fold")
    broken = []
    with errors():
        for name in known_methods():
            try:
                options = options_class(name)
            except SafetyError as error:
                broken.append(str(error))
                continue
            acts = {"correction": "when training ends", "merge": "while training, and when it ends"}.get(options.stage, "while training")
            table.add_row(name, acts, options.needs, options.costs, options.source)
    Console().print(table)
    for text in broken:
        typer.secho(text, fg="yellow", err=True)
