"""Commands of the alignment vector: as a separate adapter, and for whole checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trl_safety.cli.base import app, errors


@app.command(name="alignment-adapter")
def alignment_adapter(
    subspace: Annotated[str, typer.Argument(help="Subspace file with a rank, or a Hub id.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the adapter.", show_default=False)],
    gamma: Annotated[float, typer.Option(help="γ, how much of V to add.")] = 1.0,
    rank: Annotated[int | None, typer.Option(help="k, how many of V's leading directions to keep.  [default: all]")] = None,
) -> None:
    """Write γ·V as a separate LoRA adapter, to be activated beside a user's adapter."""
    with errors():
        from trl_safety.corrections.alignment_vector_files import write_alignment_adapter
        from trl_safety.subspace.artifact import AlignmentSubspace

        write_alignment_adapter(AlignmentSubspace.from_pretrained(subspace), output, gamma=gamma, rank=rank)
        typer.echo(f"{output}: written; model.load_adapter({str(output)!r}, 'alignment'), then activate both adapters")


@app.command(name="add-vector")
def add_vector(
    model: Annotated[str, typer.Argument(help="The fine-tuned model with its adapter merged in: folder or Hub id.", show_default=False)],
    base: Annotated[str, typer.Option(help="The unaligned model.", show_default=False)],
    aligned: Annotated[str, typer.Option(help="The aligned model that was fine-tuned.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the model.", show_default=False)],
    gamma: Annotated[float, typer.Option(help="γ, how much of V to add.")] = 1.0,
    kappa: Annotated[float, typer.Option(help="κ, how much of the fine-tuning to keep.")] = 1.0,
) -> None:
    """Add the whole alignment vector to a merged model, file by file (RESTA)."""
    with errors():
        from trl_safety.corrections.alignment_vector_files import add_vector as add

        left = add(model, base, aligned, output, gamma=gamma, kappa=kappa)
        typer.echo(f"{output}: written")
        if left:
            typer.secho(f"left unchanged, since one of the pair lacks them: {', '.join(left)}", fg="yellow")
