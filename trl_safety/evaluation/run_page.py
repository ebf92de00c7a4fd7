"""`trl-safety report`: one page on a finished run, for someone who did not run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trl_safety.adapters.files import replacing
from trl_safety.errors import ConfigurationError, ReportError, SafetyError
from trl_safety.evaluation import page
from trl_safety.evaluation.evaluate import Evaluation, read_evaluation, refuse_another
from trl_safety.evaluation.sweep import HEADINGS, Sweep, figure, rows
from trl_safety.training.inspection import common_prefix
from trl_safety.training.report import MethodReport, SafetyReport, read_report, verify

CURVES = (
    "loss",
    "eval_loss",
    "safety/attack",
    "safety/over_refusal",
    "safety/update_norm",
    "safety/asft_penalty",
    "safety/kept_share",
    "safety/conflict",
)


def write_run_page(folder: Path, output: Path, *, evaluation: Path | None = None, sweep: Path | None = None) -> None:
    """Write the page: what was applied, layer by layer; the training's curves; before and after; the sweep.

    Args:
        folder: of the saved adapter, with its `safety_report.json`.
        output: the HTML file.
        evaluation: of `trl-safety eval`.
        sweep: of `trl-safety sweep`: the folder, or `sweep.json`.

    Raises:
        ReportError: the folder has no report.
        ConfigurationError: the evaluation or the sweep cannot be read.
        SafetyError: the page cannot be written.
    """
    report = read_report(folder)
    parts = [*_summary(folder, report)]
    for method in report.methods:
        parts += _method(method)
    parts += _curves(folder)
    if evaluation is not None:
        found = read_evaluation(evaluation)
        refuse_another(found, folder)
        parts += _evaluation(found)
    if sweep is not None:
        parts += _sweep(_read_sweep(sweep))
    text = page.page(f"Safety of {folder.resolve().name}", *parts)
    with replacing(output, error=SafetyError, setting="output") as temporary:
        temporary.write_text(text, encoding="utf-8")


def _summary(folder: Path, report: SafetyReport) -> list[str]:
    try:
        verify(folder)
        state = page.paragraph(
            "A safety method acted on this adapter, and its files are as the report describes them. That is no proof of safety.", "good"
        )
    except ReportError as error:
        state = page.paragraph(str(error), "bad")
    facts = [("base model", report.base_model or "unknown"), ("checked", report.base_check), ("stage", report.stage)]
    facts += [("made", f"{report.created}, trl-safety {report.trl_safety}")]
    if report.subspace:
        facts.append(("alignment subspace", f"{report.subspace['base']} → {report.subspace['aligned']}, {report.subspace['cut']}"))
    if report.skipped:
        facts.append(("left alone on request", ", ".join(report.skipped)))
    if report.not_covered:
        facts.append(("trained, but covered by no method", ", ".join(report.not_covered)))
    return [state, page.table(("", ""), facts)]


def _method(method: MethodReport) -> list[str]:
    settings = ", ".join(f"{key} = {value}" for key, value in method.settings.items() if value is not None)
    parts = [
        page.heading(method.source),
        page.paragraph(method.summary, "good" if method.acted else "bad"),
        page.paragraph(f"Settings: {settings}"),
    ]
    measured = {name: layer.measured for name, layer in method.layers.items() if layer.measured}
    if measured:
        parts.append(page.picture(page.png(_layers(measured)), f"what {method.name} measured in every layer"))
    return parts


def _layers(measured: dict[str, dict[str, float]]) -> Any:
    from matplotlib.figure import Figure

    keys = list(dict.fromkeys(key for row in measured.values() for key in row))[:4]
    names = list(measured)
    shared = common_prefix(names)
    chart = Figure(figsize=(11, max(2.5, 0.16 * len(names) + 1.2)), layout="constrained")
    for axis, key in zip(chart.subplots(1, len(keys), sharey=True, squeeze=False)[0], keys, strict=True):
        axis.barh(range(len(names)), [measured[name].get(key, 0.0) for name in names], color="#44617b")
        axis.set(title=key, yticks=range(len(names)))
        axis.set_yticklabels([name.removeprefix(shared) for name in names], fontsize=6)
        axis.grid(axis="x", alpha=0.3)
    chart.axes[0].invert_yaxis()
    return chart


def _curves(folder: Path) -> list[str]:
    """From the trainer's state: beside the adapter, or in the last checkpoint."""
    states = [
        folder / "trainer_state.json",
        *sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[-1])),
    ]
    found = [path for path in states if path.is_file()]
    if not found:
        return []
    history = json.loads(found[-1].read_text(encoding="utf-8")).get("log_history", [])
    series = {key: [(row["step"], row[key]) for row in history if isinstance(row.get(key), int | float)] for key in CURVES}
    series = {key: values for key, values in series.items() if len(values) > 1}
    if not series:
        return []
    from matplotlib.figure import Figure

    columns = min(3, len(series))
    lines = -(-len(series) // columns)
    chart = Figure(figsize=(11, 2.6 * lines), layout="constrained")
    axes = chart.subplots(lines, columns, squeeze=False).flatten()
    for axis, (key, values) in zip(axes, series.items(), strict=False):
        axis.plot(*zip(*values, strict=True), color="#b5483a" if key in ("safety/attack", "safety/over_refusal") else "#44617b")
        axis.set(title=key, xlabel="step")
        axis.grid(alpha=0.3)
    for axis in axes[len(series) :]:
        axis.set_visible(False)
    return [page.heading("While training"), page.picture(page.png(chart), f"curves of {', '.join(series)}")]


def _evaluation(evaluation: Evaluation) -> list[str]:
    cells = [
        [model.name, scores.judge, *("–" if rate is None else str(rate) for rate in (scores.attack, scores.over_refusal, scores.task))]
        for model in evaluation.models
        for scores in model.scores
    ]
    parts = [
        page.heading("Before and after" if evaluation.before else "Evaluation"),
        page.table(("model", "judge", "attack ↓", "over-refusal ↓", "task ↑"), cells),
    ]
    parts += [
        page.paragraph(f"{kind}: before and after differ with p = {p:.2g} (exact McNemar test).") for kind, p in evaluation.p_values.items()
    ]
    parts += [
        page.paragraph(f"{pair.first} and {pair.second} agree on {pair.equal:.1%} (kappa {pair.kappa:.2f}).")
        for pair in evaluation.agreement
    ]
    if evaluation.after.judge == "keywords":
        parts.append(page.paragraph("Judged by phrases of refusal, the weakest judge there is: read the completions."))
    return parts


def _sweep(found: Sweep) -> list[str]:
    return [
        page.heading("Which strength?"),
        page.paragraph(f"Of {found.adapter}, as it was before any correction."),
        page.picture(page.png(figure(found)), "attack against task"),
        page.table(HEADINGS, rows(found)),
    ]


def _read_sweep(path: Path) -> Sweep:
    file = path / "sweep.json" if path.is_dir() else path
    try:
        return Sweep.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"sweep = {str(file)!r}: cannot be read ({str(error).splitlines()[0]}); run `trl-safety sweep`") from error
