"""Commands that ask a model and judge its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trl_safety.cli.base import Adapter, app, errors
from trl_safety.cli.show import print_evaluation


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="The model: local folder or Hub id.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="New folder for evaluation.json and completions.jsonl.", show_default=False)
    ],
    adapter: Annotated[Path | None, typer.Option(help="Folder of a LoRA adapter on it.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Also before: 'aligned' (no adapter), another adapter's folder, or another model.")
    ] = None,
    harmful: Annotated[Path | None, typer.Option(help="JSON lines with `prompt`: complied with or refused?")] = None,
    benign: Annotated[Path | None, typer.Option(help="JSON lines with `prompt`: refused without need?")] = None,
    task: Annotated[Path | None, typer.Option(help="JSON lines with `prompt` and `answer`: right?")] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="keywords, keywords:FILE, classifier:PATH, guard:PATH, wildguard:PATH?prompt=FILE or chat:PATH; several.  [default: keywords]"
        ),
    ] = None,
    inspect: Annotated[list[str] | None, typer.Option(help="A task of inspect_ai, e.g. inspect_evals/xstest; several.")] = None,
    grader: Annotated[str | None, typer.Option(help="With --inspect: a local model for tasks that are graded by one.")] = None,
    lm_eval: Annotated[list[str] | None, typer.Option(help="A task of lm-evaluation-harness, e.g. gsm8k; several.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of each of those tasks, the first so many samples.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Length of completions.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 32,
    revision: Annotated[
        str | None, typer.Option(help="Hub revision of MODEL.  [default: the one that the adapter names of its base]")
    ] = None,
    baseline_revision: Annotated[str | None, typer.Option(help="Hub revision of a --baseline that is another model.")] = None,
    grader_revision: Annotated[str | None, typer.Option(help="Hub revision of the --grader.")] = None,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Load the model in NF4.")] = False,
) -> None:
    """Ask prompts, judge the completions, and say with intervals what is refused, complied with and right; before and after."""
    with errors():
        from trl_safety.adapters.files import refuse_full
        from trl_safety.adapters.folder import CONFIG
        from trl_safety.errors import ConfigurationError
        from trl_safety.evaluation import evaluate as evaluating
        from trl_safety.evaluation.judges import make_judge
        from trl_safety.evaluation.loading import load_model
        from trl_safety.evaluation.unfinished import UnfinishedError, run_all
        from trl_safety.scoring import read_sets

        sets = read_sets(harmful=harmful, benign=benign, task=task)
        refuse_full(output, error=ConfigurationError, setting="output")
        judges = [make_judge(text) for text in judge or ["keywords"]]
        other = baseline is not None and baseline != evaluating.ALIGNED and not (Path(baseline) / CONFIG).is_file()
        if baseline_revision is not None and not other:
            raise ConfigurationError(
                f"--baseline-revision = {baseline_revision!r}: is of a --baseline that is another model, and --baseline = {baseline!r} is none; leave it out"
            )
        if grader_revision is not None and grader is None:
            raise ConfigurationError(f"--grader-revision = {grader_revision!r}: there is no --grader; leave it out")
        for option, value in (("--grader", grader), ("--limit", limit)):
            if value is not None and not (inspect or (lm_eval and option == "--limit")):
                raise ConfigurationError(
                    f"{option} = {value!r}: is used by {'--inspect' if option == '--grader' else '--inspect and --lm-eval'} alone"
                )

        def benchmarks(model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
            from trl_safety.evaluation.harness import run_lm_eval
            from trl_safety.evaluation.inspecting import run_inspect

            def by_inspect() -> dict[str, dict[str, float]]:
                asked = load_model(grader, None, revision=grader_revision) if grader else None
                return run_inspect(
                    model, tokenizer, inspect or [], log_dir=output / "inspect", limit=limit, batch_size=batch_size, grader=asked
                )

            def by_harness() -> dict[str, dict[str, float]]:
                return run_lm_eval(model, tokenizer, lm_eval or [], batch_size=batch_size, limit=limit)

            return run_all([run for run, names in ((by_inspect, inspect), (by_harness, lm_eval)) if names])

        options: dict[str, Any] = {
            "benchmarks": benchmarks if inspect or lm_eval else None,
            "new_tokens": new_tokens,
            "batch_size": batch_size,
            "output": output,
        }
        before: Any = baseline
        if baseline is not None and other:
            name = f"{baseline}@{baseline_revision}" if baseline_revision else baseline
            # Asked before the model is loaded: never two models in memory.
            before = evaluating.evaluate_one(
                *load_model(baseline, None, load_in_4bit=load_in_4bit, revision=baseline_revision), sets, judges, name=name, **options
            )
        loaded, tokenizer = load_model(model, adapter, load_in_4bit=load_in_4bit, revision=revision)
        try:
            evaluation, _ = evaluating.evaluate(
                loaded,
                tokenizer,
                sets,
                judges,
                name=f"{model}@{revision}" if revision else model,
                adapter=str(adapter) if adapter else None,
                baseline=before,
                grader=f"{grader}@{grader_revision}" if grader_revision else grader,
                **options,
            )
        except UnfinishedError as error:
            if error.found is not None:
                print_evaluation(error.found)
            raise
        print_evaluation(evaluation)
        typer.echo(f"{output / 'evaluation.json'}, completions.jsonl: written; read the completions")


@app.command()
def report(
    adapter: Adapter,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file.", show_default=False)],
    evaluation: Annotated[Path | None, typer.Option(help="Folder of `trl-safety eval`.")] = None,
    sweep: Annotated[Path | None, typer.Option(help="Folder of `trl-safety sweep`.")] = None,
) -> None:
    """One self-contained page on a finished run: what was applied, per layer; the training's curves; before and after; the sweep."""
    with errors():
        from trl_safety.evaluation.run_page import write_run_page

        write_run_page(adapter, output, evaluation=evaluation, sweep=sweep)
        typer.echo(f"{output}: written")


@app.command()
def gate(
    config: Annotated[Path, typer.Option("--config", help="YAML with the thresholds.", show_default=False)],
    junit: Annotated[Path | None, typer.Option(help="Write the checks as a JUnit file.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the checks as JSON.")] = None,
) -> None:
    """Check an evaluation and a report against thresholds. Exit status 0 only where all hold."""
    with errors():
        from trl_safety.evaluation import gate as gating

        checks = gating.run_gate(config)
        for check in checks:
            typer.secho(f"{'passed' if check.passed else 'FAILED'}: {check.name}: {check.found}", fg="green" if check.passed else "red")
        if junit:
            gating.write_junit(checks, junit)
        if json:
            gating.write_json(checks, json)
        if not all(check.passed for check in checks):
            raise typer.Exit(1)
