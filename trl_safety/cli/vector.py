"""`trl-safety vector`: V for a model without a base, from an adapter that is trained to refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trl_safety.cli.base import app, errors


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def vector(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The model to fine-tune later: local folder or Hub id.", show_default=False)],
    refusals: Annotated[
        str, typer.Option(help="Rows with harmful requests and refusals: .jsonl, .csv, .parquet, a data set folder or a Hub id.")
    ],
    benign: Annotated[str, typer.Option(help="Rows with benign requests and answers, in the same form.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the subspace and the adapter.", show_default=False)],
    buffer: Annotated[str | None, typer.Option(help="A BufferLoRA to train beside.")] = None,
) -> None:
    """Train a LoRA on MODEL to refuse, and write its update as an alignment subspace, for every method that reads one.

    Further arguments, and a YAML with --config, are those of `trl sft`.
    """
    with errors():
        from trl_safety.errors import ConfigurationError
        from trl_safety.training.sft import run_vector

        if model.startswith("-"):
            raise ConfigurationError(
                f"{model}: stands where MODEL was expected: name the model first, and further arguments of `trl sft` after it"
            )
        made = run_vector(model, refusals, benign, output, buffer=buffer, arguments=context.args)
        if made is not None:
            typer.echo(f"{output}: {len(made.layers)} layers; V is {made.provenance.origin}; use it as safety.subspace or --subspace")
