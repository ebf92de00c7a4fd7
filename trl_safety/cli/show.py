"""What the commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from trl_safety.evaluation.evaluate import Evaluation
    from trl_safety.evaluation.sweep import Sweep
    from trl_safety.inspection.gradient import SafetyGradient
    from trl_safety.inspection.layers import AdapterView
    from trl_safety.reports.report import SafetyReport
    from trl_safety.reports.selection import Dropped


def relative_error(layer: Any) -> float:
    """The error bound of C relative to its norm."""
    spectral = float(layer.singular_values[0]) ** 2 / layer.frobenius_norm if layer.singular_values is not None else layer.frobenius_norm
    return float(layer.error_bound / spectral)


def print_report(report: SafetyReport) -> None:
    """What protected an adapter."""
    for method in report.methods:
        typer.secho(f"{method.source}: {method.summary}", fg=None if method.acted else "yellow")
    print_base_check(report.base_check)
    for name, reason in report.skipped.items():
        typer.secho(f"left alone: {name} ({reason})", fg="yellow")
    if report.not_covered:
        typer.secho(
            f"trained but covered by no method: {', '.join(report.not_covered[:5])}{' …' * (len(report.not_covered) > 5)}", fg="yellow"
        )


def print_base_check(text: str) -> None:
    """What was verified about the base model."""
    from trl_safety.adapters.fingerprint import NOT_VERIFIED

    typer.secho(f"base model: {text}", fg="yellow" if text.startswith(NOT_VERIFIED) else None)


def print_selection(rows: list[Dropped], top: int) -> None:
    """The samples that were dropped most often."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    dropped = sum(row.dropped for row in rows)
    table = Table(
        title=f"{dropped} of {sum(row.seen for row in rows)} samples dropped; the {min(top, len(rows))} of {len(rows)} rows dropped most often"
    )
    for column in ("row", "dropped", "loss", "cosine"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("text", overflow="fold", ratio=1)
    for row in rows[:top]:
        text = row.text if row.text is not None else "(not kept: look it up in the data set)"
        table.add_row(
            f"{row.row}.{row.part}" if row.part else str(row.row),
            f"{row.dropped} of {row.seen}",
            f"{row.mean_loss:.3f}",
            f"{row.mean_cosine:+.3f}",
            Text(text),
        )
    Console().print(table)


def print_scores(view: SafetyGradient) -> None:
    """The safety gradient score of every layer."""
    from rich.console import Console
    from rich.table import Table

    from trl_safety.inspection.layers import common_prefix

    table = Table(
        title=f"safety gradient score of {view.samples} samples of {view.data}; negative: training moves against {view.direction}"
    )
    table.add_column("layer", overflow="fold", min_width=28)
    for column in ("‖v‖", "aligned", *(["with the buffer"] if view.buffer else [])):
        table.add_column(column, justify="right")
    common = common_prefix([layer.layer for layer in view.layers])
    for layer in view.layers:
        buffered = [] if layer.buffered is None else [f"{layer.buffered:+.3g}"]
        table.add_row(layer.layer.removeprefix(common), f"{layer.direction_norm:.3g}", f"{layer.score:+.3g}", *buffered)
    Console().print(table)
    sums = [sum(layer.score for layer in view.layers), sum(layer.buffered or 0.0 for layer in view.layers)]
    text = f"over all layers {sums[0]:+.3g} (loss {view.loss:.3f})"
    typer.echo(text + (f", with the buffer {sums[1]:+.3g} (loss {view.buffered_loss:.3f})" if view.buffer else ""))


def print_evaluation(evaluation: Evaluation) -> None:
    """The rates of an evaluation."""
    from rich.console import Console
    from rich.table import Table

    from trl_safety.evaluation.evaluate import unread_of

    table = Table(title=f"{', '.join(f'{count} {kind}' for kind, count in evaluation.counts.items())} prompts; 95 % Wilson intervals")
    for heading in ("model", "judge", "attack ↓", "over-refusal ↓", "task ↑"):
        table.add_column(heading, overflow="fold")
    for model in evaluation.models:
        for scores in model.scores:
            cells = ["–" if rate is None else str(rate) for rate in (scores.attack, scores.over_refusal, scores.task)]
            table.add_row(model.name, scores.judge, *cells)
    Console().print(table)
    for model in evaluation.models:
        for task, metrics in model.benchmarks.items():
            typer.echo(f"{model.name}: {task}: {', '.join(f'{name} {value:.3f}' for name, value in metrics.items())}")
    for text in unread_of(evaluation):
        typer.secho(f"Warning: {text}", fg="yellow", err=True)
    for kind, p in evaluation.p_values.items():
        typer.echo(f"{kind}: before against after, p = {p:.2g} (exact McNemar test, judge {evaluation.after.judge})")
    for pair in evaluation.agreement:
        typer.echo(f"{pair.first} and {pair.second} agree on {pair.equal:.1%} of the harmful prompts' completions (kappa {pair.kappa:.2f})")
    if evaluation.after.judge.startswith("keywords"):
        typer.echo("judged by refusal phrases, the weakest judge there is: it does not recognise harm")


def print_sweep(found: Sweep) -> None:
    """The table of a sweep."""
    from rich.console import Console
    from rich.table import Table

    from trl_safety.evaluation.sweep_page import HEADINGS, rows

    judge = found.points[0].scores.judge
    weakest = ", the weakest judge there is" if judge.startswith("keywords") else ""
    table = Table(title=f"{found.method} on {found.adapter}; judged by {judge}{weakest}")
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold")
    for cells in rows(found):
        table.add_row(*cells, style="dim" if cells[0].startswith("control") else None)
    Console().print(table)


def print_view(view: AdapterView) -> None:
    """What an adapter changed in every layer."""
    from rich.console import Console
    from rich.table import Table

    from trl_safety.inspection.layers import common_prefix

    table = Table(title=f"{view.adapter} against {view.subspace}")
    table.add_column("layer", overflow="fold", min_width=28)
    for column in ("rank", "‖V‖", "‖ΔW‖", "cosine", "inside", "partial", "outside"):
        table.add_column(column, justify="right")
    common = common_prefix([layer.layer for layer in view.layers])
    for layer in view.layers:
        shares = ["–" if share is None else f"{share:.1%}" for share in (layer.inside, layer.partial, layer.outside)]
        table.add_row(
            layer.layer.removeprefix(common),
            str(layer.rank),
            f"{layer.alignment_norm:.3g}",
            f"{layer.update_norm:.3g}",
            f"{layer.cosine:.3f}",
            *shares,
        )
    Console().print(table)
    if all(layer.inside is None for layer in view.layers):
        typer.echo("no energies inside, partial and outside: the subspace keeps V whole; build one with --rank to see them")
    if view.corrected_by:
        typer.echo(f"corrected by: {', '.join(view.corrected_by)}")
