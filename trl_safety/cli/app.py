"""The command line: parse, call one function, print. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from trl_safety.cli.show import (
    _print_base_check,
    _print_evaluation,
    _print_report,
    _print_scores,
    _print_selection,
    _print_sweep,
    _print_view,
    _relative_error,
)

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


class Method(enum.StrEnum):
    """Corrections of a saved adapter."""

    safe_lora = "safe_lora"
    csulora = "csulora"
    alignment_vector = "alignment_vector"


class OperatorChoice(enum.StrEnum):
    """How the alignment subspace acts."""

    scaled = "scaled"
    orthogonal = "orthogonal"


class OutputRank(enum.StrEnum):
    """What csulora does about the rank, which its result doubles."""

    exact = "exact"
    original = "original"


@contextmanager
def _errors() -> Iterator[None]:
    """Print our own errors as a line or two; anything else keeps its traceback."""
    from trl_safety.errors import SafetyError

    try:
        yield
    except SafetyError as error:
        typer.secho(f"Error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


@app.command()
def subspace(
    base: Annotated[str, typer.Argument(help="The unaligned model: local folder or Hub id.", show_default=False)],
    aligned: Annotated[str, typer.Argument(help="The aligned model: local folder or Hub id.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write (.safetensors).", show_default=False)],
    adapter: Annotated[Path | None, typer.Option(help="Take the layers of this adapter.")] = None,
    target_modules: Annotated[str | None, typer.Option(help="Layers by ending, comma-separated, or all-linear.")] = None,
    rank: Annotated[int | None, typer.Option(help="Singular directions to keep of each layer.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Keep as many as bring C's relative error below this.")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Keep V itself, for an exact C.")] = False,
    base_revision: Annotated[str | None, typer.Option(help="Hub revision of BASE.")] = None,
    aligned_revision: Annotated[str | None, typer.Option(help="Hub revision of ALIGNED.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute; a GPU when there is one.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with ALIGNED.")] = False,
    push_to_hub: Annotated[str | None, typer.Option(help="Also upload to this Hub repository.", metavar="REPO")] = None,
) -> None:
    """Build the alignment subspace of a base/aligned pair, reading both tensor by tensor."""
    with _errors():
        from trl_safety.subspace.build import build_subspace

        targets: Any = target_modules
        if target_modules is not None and target_modules.lower() != "all-linear":
            targets = [entry.strip() for entry in target_modules.split(",") if entry.strip()]
        built = build_subspace(
            output,
            base,
            aligned,
            target_modules=targets,
            adapter=adapter,
            rank=rank,
            tolerance=tolerance,
            whole=whole,
            base_revision=base_revision,
            aligned_revision=aligned_revision,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        ranks = sorted(layer.rank for layer in built.layers.values())
        relative = max(_relative_error(layer) for layer in built.layers.values())
        typer.echo(
            f"{output}: {len(built.layers)} layers, rank {ranks[0]} to {ranks[-1]}, {output.stat().st_size / 1e6:.1f} MB; "
            f"C is exact to {relative:.2g} of its norm"
        )
        if push_to_hub:
            typer.echo(built.push_to_hub(push_to_hub))


@app.command()
def correct(
    adapter: Adapter,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the corrected adapter.", show_default=False)],
    subspace: Subspace,
    method: Annotated[Method, typer.Option(help="csulora is a reconstruction: its formula is not public.", show_default=False)],
    threshold: Annotated[float | None, typer.Option(help="safe_lora: correct layers with cosine ≤ T.  [default: 0.5]")] = None,
    layers: Annotated[int | None, typer.Option(help="safe_lora: correct the K layers of smallest cosine.")] = None,
    operator: Annotated[
        OperatorChoice | None, typer.Option(help="safe_lora: C = VVᵀ/‖V‖ (scaled) or the projector UₖUₖᵀ.  [default: scaled]")
    ] = None,
    lambda_partial: Annotated[float | None, typer.Option(help="csulora: λ_M.  [default: 1]")] = None,
    lambda_outside: Annotated[float | None, typer.Option(help="csulora: λ_O.  [default: 1]")] = None,
    output_rank: Annotated[OutputRank | None, typer.Option(help="csulora: twice the rank, or cut back.  [default: exact]")] = None,
    gamma: Annotated[float | None, typer.Option(help="alignment_vector: γ, how much of V to add.  [default: 1]")] = None,
    kappa: Annotated[float | None, typer.Option(help="alignment_vector: κ, what to keep of the update.  [default: 1]")] = None,
    rank: Annotated[int | None, typer.Option(help="alignment_vector: k, V's leading directions.  [default: all]")] = None,
    cut_to: Annotated[int | None, typer.Option(help="alignment_vector: cut the result back to this rank.")] = None,
    all_layers: Annotated[bool | None, typer.Option("--all-layers", help="alignment_vector: V also in layers ADAPTER lacks.")] = None,
    dare: Annotated[float | None, typer.Option(help="alignment_vector: share of B's entries to drop.  [default: 0]")] = None,
    seed: Annotated[int | None, typer.Option(help="alignment_vector: of DARE.  [default: 0]")] = None,
    skip_modules: Annotated[str | None, typer.Option(help="Layers to leave alone, by ending, comma-separated.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute; a GPU when there is one.")] = None,
) -> None:
    """Correct a saved adapter into a new folder. No model is loaded; the input is never changed."""
    with _errors():
        from trl_safety.config.alignment_vector import AlignmentVectorConfig
        from trl_safety.config.correction import CorrectionConfig
        from trl_safety.config.csulora import CsuloraConfig
        from trl_safety.config.options import validate
        from trl_safety.config.safe_lora import SafeLoraConfig
        from trl_safety.corrections.folder import correct_folder
        from trl_safety.corrections.registry import correction_for
        from trl_safety.subspace.artifact import AlignmentSubspace

        given = {
            "threshold": threshold,
            "layers": layers,
            "operator": operator.value if operator else None,
            "lambda_partial": lambda_partial,
            "lambda_outside": lambda_outside,
            "output_rank": output_rank.value if output_rank else None,
            "gamma": gamma,
            "kappa": kappa,
            "rank": rank,
            "cut_to": cut_to,
            "all_layers": all_layers,
            "dare": dare,
            "seed": seed,
        }
        options = {key: value for key, value in given.items() if value is not None}
        classes: dict[Method, type[CorrectionConfig]] = {
            Method.safe_lora: SafeLoraConfig,
            Method.csulora: CsuloraConfig,
            Method.alignment_vector: AlignmentVectorConfig,
        }
        config = validate(classes[method], options, method.value)
        report = correct_folder(
            adapter,
            output,
            AlignmentSubspace.from_pretrained(subspace),
            correction_for(config),
            skip_modules=[entry.strip() for entry in (skip_modules or "").split(",") if entry.strip()],
            device=device,
        )
        _print_report(report)
        typer.echo(f"{output}: written")
        if not report.methods[-1].acted:
            typer.secho(f"Warning: {method.value} changed nothing: {report.methods[-1].summary}", fg="yellow", err=True)


@app.command(name="alignment-adapter")
def alignment_adapter(
    subspace: Annotated[str, typer.Argument(help="Subspace file with a rank, or a Hub id.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the adapter.", show_default=False)],
    gamma: Annotated[float, typer.Option(help="γ, how much of V it adds.")] = 1.0,
    rank: Annotated[int | None, typer.Option(help="k, V's leading directions.  [default: all]")] = None,
) -> None:
    """Write γ·V as a LoRA adapter of its own, to be switched on beside a user's."""
    with _errors():
        from trl_safety.corrections.checkpoint import write_alignment_adapter
        from trl_safety.subspace.artifact import AlignmentSubspace

        write_alignment_adapter(AlignmentSubspace.from_pretrained(subspace), output, gamma=gamma, rank=rank)
        typer.echo(f"{output}: written; model.load_adapter({str(output)!r}, 'alignment'), then activate both adapters")


@app.command(name="add-vector")
def add_vector(
    model: Annotated[str, typer.Argument(help="The fine-tuned model, adapter merged in: folder or Hub id.", show_default=False)],
    base: Annotated[str, typer.Option(help="The unaligned model.", show_default=False)],
    aligned: Annotated[str, typer.Option(help="The aligned model that was fine-tuned.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the model.", show_default=False)],
    gamma: Annotated[float, typer.Option(help="γ, how much of V to add.")] = 1.0,
    kappa: Annotated[float, typer.Option(help="κ, what to keep of the fine-tuning.")] = 1.0,
) -> None:
    """Add the whole alignment vector to a merged model, file by file (RESTA)."""
    with _errors():
        from trl_safety.corrections.checkpoint import add_vector as add

        left = add(model, base, aligned, output, gamma=gamma, kappa=kappa)
        typer.echo(f"{output}: written")
        if left:
            typer.secho(f"left as they are, since one of the pair lacks them: {', '.join(left)}", fg="yellow")


@app.command()
def sweep(
    adapter: Adapter,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="New folder for table, pictures and the chosen adapter.", show_default=False)
    ],
    method: Annotated[str, typer.Option(help="safe_lora, csulora, alignment_vector or buffer_reinforce (the merge).", show_default=False)],
    grid: Annotated[list[str], typer.Option(help="OPTION=V1,V2,… of the method; several make a product.", show_default=False)],
    harmful: Annotated[Path, typer.Option(help="JSON lines with `prompt`: complied with or refused?", show_default=False)],
    model: Annotated[str | None, typer.Option(help="The aligned model.  [default: the adapter's base]")] = None,
    benign: Annotated[Path | None, typer.Option(help="JSON lines with `prompt`: refused without need?")] = None,
    task: Annotated[Path | None, typer.Option(help="JSON lines with `prompt` and `answer`: right?")] = None,
    subspace: Annotated[str | None, typer.Option("--subspace", "-s", help="Subspace file or Hub id, for the corrections.")] = None,
    reinforce: Annotated[str | None, typer.Option(help="ReinforceLoRA, for buffer_reinforce.")] = None,
    judge: Annotated[str, typer.Option(help="keywords, or one of `eval`'s.")] = "keywords",
    max_attack_success: Annotated[float | None, typer.Option(min=0, max=1, help="Choose a setting with at most this attack rate.")] = None,
    max_utility_loss: Annotated[float | None, typer.Option(min=0, max=1, help="And with at most this loss of the task.")] = None,
    controls: Annotated[bool, typer.Option(help="Also score the adapter shrunk to each point's norm.")] = True,
    new_tokens: Annotated[int, typer.Option(min=1, help="Length of completions.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 32,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Load the model in NF4.")] = False,
) -> None:
    """Try a correction at many strengths, score each, and choose the setting that meets your constraints."""
    with _errors():
        from trl_safety.adapters.files import refuse_full
        from trl_safety.errors import ConfigurationError
        from trl_safety.evaluation import sweep as sweeping
        from trl_safety.evaluation.judges import make_judge
        from trl_safety.evaluation.loading import load_model
        from trl_safety.evaluation.sweep_page import write_results
        from trl_safety.scoring import read_sets
        from trl_safety.subspace.artifact import AlignmentSubspace

        sets = read_sets(harmful=harmful, benign=benign, task=task)
        refuse_full(output, error=ConfigurationError, setting="output")
        asked = make_judge(judge)
        axes = sweeping.parse_grid(grid)
        sweeping.grid_points(method, axes)
        space = AlignmentSubspace.from_pretrained(subspace) if subspace else None
        loaded, tokenizer = load_model(model, adapter, load_in_4bit=load_in_4bit)
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
        write_results(found, output)
        _print_sweep(found)
        typer.echo(f"{output / 'sweep.html'}, sweep.png and sweep.json: written")
        if found.chosen is not None:
            sweeping.write_chosen(found, output / "adapter", subspace=space, reinforce=reinforce)
            typer.echo(f"{output / 'adapter'}: written")
        elif max_attack_success is not None or max_utility_loss is not None:
            typer.secho("Warning: no setting meets the constraints; no adapter was written", fg="yellow", err=True)
            raise typer.Exit(2)


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
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Load the model in NF4.")] = False,
) -> None:
    """Ask prompts, judge the completions, and say with intervals what is refused, complied with and right; before and after."""
    with _errors():
        from trl_safety.adapters.files import refuse_full
        from trl_safety.adapters.folder import CONFIG
        from trl_safety.errors import ConfigurationError
        from trl_safety.evaluation import evaluate as evaluating
        from trl_safety.evaluation.judges import make_judge
        from trl_safety.evaluation.loading import load_model
        from trl_safety.scoring import read_sets

        sets = read_sets(harmful=harmful, benign=benign, task=task)
        refuse_full(output, error=ConfigurationError, setting="output")
        judges = [make_judge(text) for text in judge or ["keywords"]]
        for option, value in (("--grader", grader), ("--limit", limit)):
            if value is not None and not (inspect or (lm_eval and option == "--limit")):
                raise ConfigurationError(
                    f"{option} = {value!r}: is used by {'--inspect' if option == '--grader' else '--inspect and --lm-eval'} alone"
                )

        def benchmarks(model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
            from trl_safety.evaluation.harness import run_lm_eval
            from trl_safety.evaluation.inspecting import run_inspect

            found: dict[str, dict[str, float]] = {}
            if inspect:
                asked = load_model(grader, None) if grader else None
                found |= run_inspect(
                    model, tokenizer, inspect, log_dir=output / "inspect", limit=limit, batch_size=batch_size, grader=asked
                )
            if lm_eval:
                found |= run_lm_eval(model, tokenizer, lm_eval, batch_size=batch_size, limit=limit)
            return found

        options: dict[str, Any] = {
            "benchmarks": benchmarks if inspect or lm_eval else None,
            "new_tokens": new_tokens,
            "batch_size": batch_size,
            "output": output,
        }
        before: Any = baseline
        if baseline is not None and baseline != evaluating.ALIGNED and not (Path(baseline) / CONFIG).is_file():
            # Asked before the model is loaded: never two models in memory.
            before = evaluating.evaluate_one(*load_model(baseline, None, load_in_4bit=load_in_4bit), sets, judges, name=baseline, **options)
        loaded, tokenizer = load_model(model, adapter, load_in_4bit=load_in_4bit)
        evaluation, rows = evaluating.evaluate(
            loaded, tokenizer, sets, judges, name=model, adapter=str(adapter) if adapter else None, baseline=before, **options
        )
        evaluating.write_evaluation(evaluation, rows, output)
        _print_evaluation(evaluation)
        typer.echo(f"{output / 'evaluation.json'}, completions.jsonl: written; read the completions")


@app.command()
def report(
    adapter: Adapter,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file.", show_default=False)],
    evaluation: Annotated[Path | None, typer.Option(help="Folder of `trl-safety eval`.")] = None,
    sweep: Annotated[Path | None, typer.Option(help="Folder of `trl-safety sweep`.")] = None,
) -> None:
    """One self-contained page on a finished run: what was applied, per layer; the training's curves; before and after; the sweep."""
    with _errors():
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
    with _errors():
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


@app.command()
def verify(adapter: Adapter) -> None:
    """Check that an adapter was protected and is unchanged since. Exit status 0 only then."""
    with _errors():
        from trl_safety.reports.report import verify as check

        report = check(adapter)
        _print_report(report)
        idle = [method.name for method in report.methods if not method.acted]
        which = f"protected, but not by {' and '.join(idle)}," if idle else "protected,"
        typer.secho(f"{adapter}: {which} and as its report describes it", fg="yellow" if idle else "green")


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="Folder of a saved adapter; with --selection the output folder of the run.")],
    subspace: Annotated[
        str | None, typer.Option("--subspace", "-s", help="Subspace file or Hub id; not needed with --selection.", show_default=False)
    ] = None,
    selection: Annotated[bool, typer.Option("--selection", help="List the samples that DualSelect dropped most often.")] = False,
    top: Annotated[int, typer.Option(min=1, help="With --selection: how many samples.")] = 20,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (PNG).")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the numbers (JSON).")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute; a GPU when there is one.")] = None,
) -> None:
    """Show what an adapter changed in every layer, seen from the alignment subspace; or which samples were dropped."""
    with _errors():
        from trl_safety.errors import ConfigurationError

        if selection:
            from trl_safety.training.dual_select.log import read_selection, write_selection

            unused = [name for name, value in (("--subspace", subspace), ("--plot", plot), ("--device", device)) if value]
            if unused:
                raise ConfigurationError(f"{unused[0]}: has no use with --selection; remove it")
            rows = read_selection(adapter)
            _print_selection(rows, top)
            if json:
                write_selection(rows, json)
            return
        if subspace is None:
            raise ConfigurationError(
                "--subspace is missing: give the file made by `trl-safety subspace`, or --selection for a run with dual_select"
            )
        from trl_safety.inspection import layers as inspection
        from trl_safety.subspace.artifact import AlignmentSubspace

        view = inspection.inspect_adapter(adapter, AlignmentSubspace.from_pretrained(subspace), device=device)
        _print_view(view)
        _print_base_check(view.base_check)
        if json:
            inspection.write_json(view, json)
        if plot:
            inspection.plot(view, plot)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def sft(context: typer.Context) -> None:
    """Fine-tune with the arguments and YAML of `trl sft` plus a `safety:` block (try `trl-safety sft --help`)."""
    with _errors():
        from trl_safety.training.sft import run

        run(context.args)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def buffer(context: typer.Context) -> None:
    """Train a BufferLoRA, which makes the model harmful, with the arguments and YAML of `trl sft` (try `trl-safety buffer --help`)."""
    with _errors():
        from trl_safety.training.sft import run_buffer

        run_buffer(context.args)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def reinforce(context: typer.Context) -> None:
    """Train a ReinforceLoRA beside a frozen buffer: the arguments and YAML of `trl sft`, plus `buffer` (try `--help`)."""
    with _errors():
        from trl_safety.training.sft import run_reinforce

        run_reinforce(context.args)


@app.command(name="merge-reinforce")
def merge_reinforce(
    user: Annotated[Path, typer.Argument(help="Folder of the user's adapter, without the merge.", show_default=False)],
    reinforce: Annotated[str, typer.Argument(help="A ReinforceLoRA from `trl-safety reinforce`: folder or Hub id.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the merged adapter.", show_default=False)],
    alpha: Annotated[float, typer.Option(help="Share of REINFORCE's part in the user's directions to remove.")] = 0.1,
    user_weight: Annotated[float, typer.Option(help="Weight of the user's update.")] = 0.5,
    reinforce_weight: Annotated[float, typer.Option(help="Weight of REINFORCE's update.")] = 0.5,
    rank: Annotated[int | None, typer.Option(help="Cut the merged adapter back to this rank.")] = None,
    collapse_threshold: Annotated[float, typer.Option(help="Share of energy below which a direction of USER does not count.")] = 0.01,
    device: Annotated[str | None, typer.Option(help="Where to compute; a GPU when there is one.")] = None,
) -> None:
    """Merge a user's adapter with a ReinforceLoRA by QR into one ordinary adapter. No model is loaded."""
    with _errors():
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
        _print_report(report)
        typer.echo(f"{output}: written")


@app.command(name="safety-gradient")
def safety_gradient(
    model: Annotated[str, typer.Argument(help="The aligned model: local folder or Hub id.", show_default=False)],
    data: Annotated[str, typer.Argument(help="Training data: .jsonl, .csv, .parquet, a dataset folder or a Hub id.", show_default=False)],
    direction: Annotated[
        str,
        typer.Option("--direction", "-d", help="A LoRA adapter trained for safety, or a subspace file with a rank.", show_default=False),
    ],
    buffer: Annotated[str | None, typer.Option(help="A BufferLoRA: also score beside it.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Rows to use, from the first.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 512,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Load the model in NF4.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (PNG).")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the numbers (JSON).")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute; a GPU when there is one.")] = None,
) -> None:
    """Show, layer by layer, whether training on DATA moves the model with or against a safety direction."""
    with _errors():
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
        _print_scores(view)
        if json:
            inspection.write_json(view, json)
        if plot:
            safety_gradient.plot(view, plot)


@app.command()
def lab(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pair, results.json and results.png.")] = Path(
        "lab_results"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Fine-tuning runs of every method.")] = 3,
    seed: Annotated[int, typer.Option(help="The first seed; it also decides the language.")] = 0,
    innocent_base: Annotated[bool, typer.Option("--innocent-base", help="A base model that has never seen a forbidden topic.")] = False,
) -> None:
    """Make a tiny aligned model, fine-tune it on poisoned data with every method, and show what each kept and cost."""
    with _errors():
        from trl_safety.lab.experiment import run

        run(output, seeds=seeds, first_seed=seed, innocent=innocent_base)


if __name__ == "__main__":
    app()
