"""Commands that correct saved adapters."""

# The signatures are evaluated when the commands are built, so annotations must not be strings here.
from pathlib import Path
from typing import Annotated, Any

import typer

from trl_safety.cli.base import Adapter, app, errors
from trl_safety.cli.options import corrections, with_correction_options
from trl_safety.cli.show import print_report, print_sweep


@app.command()
@with_correction_options
def correct(
    adapter: Adapter,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the corrected adapter.", show_default=False)],
    method: Annotated[str, typer.Option(help=f"One of: {', '.join(corrections())}.", show_default=False)],
    subspace: Annotated[
        str | None, typer.Option("--subspace", "-s", help="Subspace file from `trl-safety subspace`, or a Hub id.", show_default=False)
    ] = None,
    skip_modules: Annotated[str | None, typer.Option(help="Layers to leave alone: comma-separated name endings.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute; a GPU when there is one.")] = None,
    **options: Any,
) -> None:
    """Correct a saved adapter into a new folder. No model is loaded; the input is never changed."""
    with errors():
        from trl_safety.config.block import correction_options_by_name
        from trl_safety.config.options import validate
        from trl_safety.corrections.registry import correct as apply
        from trl_safety.errors import ConfigurationError

        found = correction_options_by_name(method)
        if found is None:
            raise ConfigurationError(f"--method = {method!r}: acts while training; corrections are {', '.join(corrections())}")
        config = validate(found, {key: getattr(value, "value", value) for key, value in options.items() if value is not None}, method)
        report = apply(
            adapter,
            subspace,
            config,
            output=output,
            skip_modules=[entry.strip() for entry in (skip_modules or "").split(",") if entry.strip()],
            device=device,
        )
        print_report(report)
        typer.echo(f"{output}: written")
        if not report.methods[-1].acted:
            typer.secho(f"Warning: {method} changed nothing: {report.methods[-1].summary}", fg="yellow", err=True)


@app.command()
def sweep(
    adapter: Adapter,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="New folder for the table, the plots and the chosen adapter.", show_default=False)
    ],
    method: Annotated[str, typer.Option(help=f"One of: {', '.join(corrections())}.", show_default=False)],
    grid: Annotated[list[str], typer.Option(help="OPTION=V1,V2,… of the method; repeat it to try all combinations.", show_default=False)],
    harmful: Annotated[Path, typer.Option(help="JSON lines with `prompt`, which the model should refuse.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="The aligned model.  [default: the adapter's base]")] = None,
    benign: Annotated[Path | None, typer.Option(help="JSON lines with `prompt`, which the model should answer.")] = None,
    task: Annotated[Path | None, typer.Option(help="JSON lines with `prompt` and the right `answer`.")] = None,
    subspace: Annotated[str | None, typer.Option("--subspace", "-s", help="Subspace file or Hub id, for the corrections.")] = None,
    reinforce: Annotated[str | None, typer.Option(help="ReinforceLoRA, for a merge with one.")] = None,
    judge: Annotated[str, typer.Option(help="keywords, or one of `eval`'s.")] = "keywords",
    max_attack_success: Annotated[float | None, typer.Option(min=0, max=1, help="Choose a setting with at most this attack rate.")] = None,
    max_utility_loss: Annotated[float | None, typer.Option(min=0, max=1, help="And with at most this loss in the task.")] = None,
    controls: Annotated[bool, typer.Option(help="Also score the adapter shrunk to each point's norm.")] = True,
    new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per completion.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 32,
    revision: Annotated[
        str | None, typer.Option(help="Hub revision of the model.  [default: the one that the adapter names for its base]")
    ] = None,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Load the model in NF4.")] = False,
) -> None:
    """Try a correction at many strengths, score each, and choose the setting that meets your constraints."""
    with errors():
        from trl_safety.adapters.files import refuse_full
        from trl_safety.errors import ConfigurationError
        from trl_safety.evaluation import sweep as sweeping
        from trl_safety.evaluation.evaluate import write_rows
        from trl_safety.evaluation.judges import make_judge
        from trl_safety.evaluation.loading import load_model
        from trl_safety.evaluation.sweep_page import write_results
        from trl_safety.evaluation.unfinished import UnfinishedError
        from trl_safety.scoring import read_sets
        from trl_safety.subspace.artifact import AlignmentSubspace

        sets = read_sets(harmful=harmful, benign=benign, task=task)
        refuse_full(output, error=ConfigurationError, setting="output")
        asked = make_judge(judge)
        axes = sweeping.parse_grid(grid)
        sweeping.grid_points(method, axes)
        space = AlignmentSubspace.from_pretrained(subspace) if subspace else None
        loaded, tokenizer = load_model(model, adapter, load_in_4bit=load_in_4bit, revision=revision)
        try:
            found = sweeping.sweep(
                loaded,
                tokenizer,
                adapter,
                method,
                axes,
                sets,
                asked,
                subspace=space,
                reinforce=reinforce,
                controls=controls,
                max_attack_success=max_attack_success,
                max_utility_loss=max_utility_loss,
                new_tokens=new_tokens,
                batch_size=batch_size,
            )
        except UnfinishedError as error:
            write_rows(error.rows, output)
            if error.found.points:
                write_results(error.found, output)
                print_sweep(error.found)
            typer.echo(f"{output}: the results so far are written; the completions without a verdict are in completions.jsonl")
            raise
        write_results(found, output)
        print_sweep(found)
        typer.echo(f"{output / 'sweep.html'}, sweep.png and sweep.json: written")
        if found.chosen is not None:
            sweeping.write_chosen(found, output / "adapter", subspace=space, reinforce=reinforce)
            typer.echo(f"{output / 'adapter'}: written")
        elif max_attack_success is not None or max_utility_loss is not None:
            typer.secho("Warning: no setting meets the constraints; no adapter was written", fg="yellow", err=True)
            raise typer.Exit(2)
