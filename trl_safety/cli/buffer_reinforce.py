"""Commands of Buffer-and-Reinforce: the provider's adapters, and the merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trl_safety.cli.base import PASS_ON, app, errors
from trl_safety.cli.show import print_report


@app.command(context_settings=PASS_ON)
def buffer(context: typer.Context) -> None:
    """Train a BufferLoRA, which makes the model harmful, with the arguments and YAML of `trl sft` (try `trl-safety buffer --help`)."""
    with errors():
        from trl_safety.training.sft import run_buffer

        run_buffer(context.args)


@app.command(context_settings=PASS_ON)
def reinforce(context: typer.Context) -> None:
    """Train a ReinforceLoRA beside a frozen buffer: the arguments and YAML of `trl sft`, plus `buffer` (try `--help`)."""
    with errors():
        from trl_safety.training.sft import run_reinforce

        run_reinforce(context.args)


@app.command(name="merge-reinforce")
def merge_reinforce(
    user: Annotated[Path, typer.Argument(help="Folder of the user's adapter, without the merge.", show_default=False)],
    reinforce: Annotated[str, typer.Argument(help="A ReinforceLoRA from `trl-safety reinforce`: folder or Hub id.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the merged adapter.", show_default=False)],
    alpha: Annotated[float, typer.Option(help="How much of REINFORCE's part in the user's directions to remove.")] = 0.1,
    user_weight: Annotated[float, typer.Option(help="Weight of the user's update.")] = 0.5,
    reinforce_weight: Annotated[float, typer.Option(help="Weight of REINFORCE's update.")] = 0.5,
    rank: Annotated[int | None, typer.Option(help="Truncate the merged adapter to this rank.")] = None,
    collapse_threshold: Annotated[float, typer.Option(help="Share of energy below which a direction of USER is ignored.")] = 0.01,
    device: Annotated[str | None, typer.Option(help="Where to compute; a GPU when there is one.")] = None,
) -> None:
    """Merge a user's adapter with a ReinforceLoRA by QR into one ordinary adapter. No model is loaded."""
    with errors():
        from trl_safety.corrections.buffer_reinforce import merge_reinforce as merge

        report = merge(
            user,
            reinforce,
            output,
            alpha=alpha,
            user_weight=user_weight,
            reinforce_weight=reinforce_weight,
            rank=rank,
            collapse_threshold=collapse_threshold,
            device=device,
        )
        print_report(report)
        typer.echo(f"{output}: written")
