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
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the pairs, the finished rows, results.json and results.png.")
    ] = Path("lab_results"),
    pairs: Annotated[int, typer.Option(min=1, help="Base/aligned pairs. A claim needs several.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="Fine-tuning runs per method and pair.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the first pair and of the first fine-tuning.")] = 0,
    innocent_base: Annotated[bool, typer.Option("--innocent-base", help="Use base models that have never seen a forbidden topic.")] = False,
    both_bases: Annotated[bool, typer.Option("--both-bases", help="Use pairs of both kinds of base.")] = False,
    methods: Annotated[list[str] | None, typer.Option("--methods", help="Only these rows; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Every method at one strength, without the controls that are trained.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 2,
) -> None:
    """Make tiny aligned models, fine-tune them on poisoned data with every method, and show what each kept and cost.

    Finished rows are kept in the folder: an interrupted run continues, and the same command with more pairs adds to it.
    """
    with errors():
        from trl_safety.errors import ConfigurationError
        from trl_safety.lab.experiment import run
        from trl_safety.lab.rows import GROUPS
        from trl_safety.lab.settings import FULL, QUICK

        if unknown := sorted(set(methods or ()) - set(GROUPS)):
            raise ConfigurationError(f"methods = {unknown[0]!r}: the lab's rows are {', '.join(GROUPS)}")
        run(
            output,
            pairs=pairs,
            seeds=seeds,
            first=seed,
            bases=(False, True) if both_bases else (innocent_base,),
            methods=methods or tuple(GROUPS),
            settings=QUICK if quick else FULL,
            workers=workers,
        )
