"""Commands that train, or examine training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trl_safety.cli.base import PASS_ON, app, errors
from trl_safety.cli.show import print_scores


@app.command(context_settings=PASS_ON)
def sft(context: typer.Context) -> None:
    """Fine-tune with the arguments and YAML of `trl sft` plus a `safety:` block (try `trl-safety sft --help`)."""
    with errors():
        from trl_safety.training.sft import run

        run(context.args)


@app.command(name="safety-gradient")
def safety_gradient(
    model: Annotated[str, typer.Argument(help="The aligned model: local folder or Hub id.", show_default=False)],
    data: Annotated[str, typer.Argument(help="Training data: .jsonl, .csv, .parquet, a dataset folder or a Hub id.", show_default=False)],
    direction: Annotated[
        str,
        typer.Option("--direction", "-d", help="A LoRA adapter trained for safety, or a subspace file with a rank.", show_default=False),
    ],
    buffer: Annotated[str | None, typer.Option(help="A BufferLoRA, to add the scores with it attached.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Rows to use, from the first.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Maximum tokens per row.")] = 512,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Load the model in NF4.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a plot (PNG).")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the numbers (JSON).")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute; a GPU when there is one.")] = None,
) -> None:
    """Show, layer by layer, whether training on DATA moves the model with or against a safety direction."""
    with errors():
        from trl_safety.inspection import gradient as safety_gradient
        from trl_safety.inspection import layers as inspection

        view = safety_gradient.safety_gradient(
            model,
            data,
            direction,
            buffer=buffer,
            samples=samples,
            batch_size=batch_size,
            max_length=max_length,
            load_in_4bit=load_in_4bit,
            device=device,
        )
        print_scores(view)
        if json:
            inspection.write_json(view, json)
        if plot:
            safety_gradient.plot(view, plot)


@app.command()
def lab(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pair, results.json and results.png.")] = Path(
        "lab_results"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Fine-tuning runs per method.")] = 3,
    seed: Annotated[int, typer.Option(help="The first seed; it also determines the language.")] = 0,
    innocent_base: Annotated[bool, typer.Option("--innocent-base", help="Use a base model that has never seen a forbidden topic.")] = False,
) -> None:
    """Make a tiny aligned model, fine-tune it on poisoned data with every method, and show what each kept and cost."""
    with errors():
        from trl_safety.lab.experiment import run

        run(output, seeds=seeds, first_seed=seed, innocent=innocent_base)
