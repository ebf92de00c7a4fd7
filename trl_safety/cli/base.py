"""The application, and what its commands share. A command imports heavy packages itself, when it needs them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Keep an aligned model's safety through LoRA fine-tuning: build alignment subspaces, correct, inspect and verify adapters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Adapter = Annotated[Path, typer.Argument(help="Folder of a saved LoRA adapter.", show_default=False)]
Subspace = Annotated[
    str, typer.Option("--subspace", "-s", help="Subspace file from `trl-safety subspace`, or a Hub id.", show_default=False)
]
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Context settings of commands that pass their arguments to TRL's parser."""


@contextmanager
def errors() -> Iterator[None]:
    """Print our own errors as a line or two; anything else keeps its traceback."""
    from trl_safety.errors import SafetyError

    # PEFT imports bitsandbytes, which warns on some processors that it could not fetch a kernel for 4-bit layers. That affects only
    # speed, and only commands that load such layers.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        yield
    except SafetyError as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
