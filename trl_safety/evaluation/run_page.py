"""`trl-safety report`: one page on a finished run, for someone who did not run it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from trl_safety.adapters.files import replacing
from trl_safety.config.block import known_methods, options_class
from trl_safety.config.method import MethodOptions
from trl_safety.errors import AdapterError, ConfigurationError, ReportError, SafetyError, reason
from trl_safety.evaluation import page
from trl_safety.evaluation.evaluate import Evaluation, read_evaluation, refuse_another, unread_of
from trl_safety.evaluation.sweep import Sweep
from trl_safety.evaluation.sweep_page import figure, p_text, rates_explained, section
from trl_safety.inspection.layers import common_prefix
from trl_safety.reports.report import MethodReport, SafetyReport, read_report, verify
from trl_safety.scoring import KINDS
from trl_safety.subspace.layer import subspace_origin

CURVES = {
    "loss": "on the training data, with what the methods add to it",
    "eval_loss": "on the evaluation data",
    "safety/attack": "share of harmful prompts complied with",
    "safety/unread": "answers without a verdict",
    "safety/over_refusal": "share of benign prompts refused",
    "safety/update_norm": "‖ΔW‖ over all layers",
}
SHARES = ("attack", "over_refusal", "share", "conflict")
"""Ends of the names of curves between 0 and 1."""
MEASURED = {
    "update_norm": "‖ΔW‖ of the layer before any correction",
    "corrected_norm": "‖ΔW‖ after the correction; a layer without was left alone, and is as in update_norm (grey behind bars)",
    "cosine": "of the update with what the subspace keeps of it, or with the vector that was added",
    "penalty": "the update outside the subspace, squared",
    "inside": "share of ‖ΔW‖² inside the subspace",
    "partial": "share inside on one side, of input and output, alone",
    "outside": "share inside on neither",
}
MOST_BARS = 60


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
    parts += _curves(folder, report.methods)
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
            "A safety method acted on this adapter, and its files are as the report describes them. That is no proof of safety."
        )
    except (ReportError, AdapterError) as error:
        state = page.paragraph(str(error), "bad")
    facts: list[tuple[str, str | list[str]]] = [("base model", page.short(report.base_model or "unknown"))]
    facts += [("checked", report.base_check), ("stage", report.stage)]
    facts += [("made", f"{report.created}, trl-safety {report.trl_safety}")]
    if report.subspace:
        facts.append(("alignment subspace", f"{subspace_origin(report.subspace, page.short)}, {report.subspace['cut']}"))
    if report.skipped:
        facts.append(("left alone on request", list(report.skipped)))
    if report.not_covered:
        facts.append(("trained, but covered by no method", report.not_covered))
    return [state, page.facts(facts)]


def _method(method: MethodReport) -> list[str]:
    settings = ", ".join(f"{key} = {value}" for key, value in method.settings.items() if value is not None)
    parts = [
        page.heading(method.source),
        page.paragraph(method.summary),
        page.paragraph(f"Settings: {settings}"),
    ]
    measured = {name: layer.measured for name, layer in method.layers.items() if layer.measured}
    if measured:
        keys = list(dict.fromkeys(key for row in measured.values() for key in row))[:4]
        parts.append(page.picture(page.png(_layers(measured, keys)), f"what {method.name} measured in every layer"))
        known = {**MEASURED, **_words(method.name).measured}
        parts.append(page.facts((key, known[key]) for key in keys if key in known))
    return parts


def _words(name: str) -> type[MethodOptions]:
    """What a method says of its own numbers; nothing where it is of a package that is not installed here."""
    return options_class(name) if name in known_methods() else MethodOptions


def _layers(measured: dict[str, dict[str, float]], keys: list[str]) -> Any:
    from matplotlib.figure import Figure

    names = sorted(measured, key=lambda name: re.sub(r"\d+", lambda digits: digits[0].zfill(9), name))
    shared = common_prefix(names)
    places = {name: place for name in names if (place := re.search(r"(?<![^.])(\d+)\.", name))}
    if len(names) > MOST_BARS and len(places) == len(names):
        cells = {
            ((name[: place.start()] + name[place.end() :]).removeprefix(shared), int(place[1])): measured[name]
            for name, place in places.items()
        }
        return _heat_map(cells, keys)
    chart = Figure(figsize=(11, max(2.5, 0.16 * len(names) + 1.2)), layout="constrained")
    for axis, key in zip(chart.subplots(1, len(keys), sharey=True, squeeze=False)[0], keys, strict=True):
        if key == "corrected_norm":
            axis.barh(range(len(names)), [measured[name].get("update_norm", 0.0) for name in names], color="#d5d5d5")
        axis.barh(range(len(names)), [measured[name].get(key, 0.0) for name in names], color="#44617b")
        axis.set(title=key, yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
        axis.tick_params(axis="x", top=True, labeltop=True, bottom=False, labelbottom=False)
        axis.set_yticklabels([name.removeprefix(shared) for name in names], fontsize=6)
        axis.grid(axis="x", alpha=0.3)
    return chart


def _heat_map(cells: dict[tuple[str, int], dict[str, float]], keys: list[str]) -> Any:
    """One map per key, of cells by module and block."""
    from matplotlib.figure import Figure

    modules = list(dict.fromkeys(module for module, _ in cells))
    blocks = sorted({block for _, block in cells})
    chart = Figure(figsize=(11, len(keys) * (0.2 * len(modules) + 1.1)), layout="constrained")
    for axis, key in zip(chart.subplots(len(keys), 1, squeeze=False)[:, 0], keys, strict=True):
        values = [[cells.get((module, block), {}).get(key, math.nan) for block in blocks] for module in modules]
        chart.colorbar(axis.imshow(values, aspect="auto"), ax=axis, pad=0.01)
        step = -(-len(blocks) // 40)
        axis.set_xticks(range(0, len(blocks), step), blocks[::step], fontsize=7)
        axis.set_yticks(range(len(modules)), modules, fontsize=7)
        axis.set(title=key, xlabel="block")
    return chart


def _curves(folder: Path, methods: list[MethodReport]) -> list[str]:
    """From the trainer's state: beside the adapter, or in the last checkpoint."""
    states = [
        folder / "trainer_state.json",
        *sorted(
            folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: [int(part) for part in re.findall(r"\d+", path.parent.name)]
        ),
    ]
    found = [path for path in states if path.is_file()]
    if not found:
        return []
    curves = dict(CURVES)
    for method in methods:
        curves |= {f"safety/{key}": text for key, text in _words(method.name).curves.items()}
    try:
        history = [row for row in json.loads(found[-1].read_text(encoding="utf-8"))["log_history"] if isinstance(row.get("step"), int)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # The rest of the page says what it says without the curves.
        return [page.heading("While training"), page.paragraph(f"{found[-1].name} cannot be read ({reason(error)}).", "bad")]
    series = {key: [(row["step"], row[key]) for row in history if isinstance(row.get(key), int | float)] for key in curves}
    series = {key: values for key, values in series.items() if len(values) > 1}
    if not series:
        return []
    from matplotlib.figure import Figure

    columns = min(3, len(series))
    lines = -(-len(series) // columns)
    chart = Figure(figsize=(11, 2.6 * lines), layout="constrained")
    axes = chart.subplots(lines, columns, squeeze=False).flatten()
    for axis, (key, values) in zip(axes, series.items(), strict=False):
        axis.plot(*zip(*values, strict=True), marker=".", color="#b5483a" if key in ("safety/attack", "safety/over_refusal") else "#44617b")
        axis.set(title=key, xlabel="step")
        if key.endswith(SHARES):
            axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
    for axis in axes[len(series) :]:
        axis.set_visible(False)
    return [
        page.heading("While training"),
        page.picture(page.png(chart), f"curves of {', '.join(series)}"),
        page.facts((key, curves[key]) for key in series),
    ]


def _evaluation(evaluation: Evaluation) -> list[str]:
    roles = ("before: ", "after: ") if evaluation.before else ("",)
    cells = [
        [
            role + page.short(model.name),
            scores.judge,
            *("–" if rate is None else str(rate) for rate in (scores.attack, scores.over_refusal, scores.task)),
        ]
        for role, model in zip(roles, evaluation.models, strict=True)
        for scores in model.scores
    ]
    explained = rates_explained(evaluation.after)
    unread = unread_of(evaluation)
    if evaluation.p_values:
        tests = [p_text(evaluation.p_values[kind]) if kind in evaluation.p_values else "–" for kind in KINDS]
        cells.append(["p", evaluation.after.judge, *tests])
        explained += f" p: exact McNemar test of after against before on the same prompts, judge {evaluation.after.judge}."
    parts = [
        page.heading("Before and after" if evaluation.before else "Evaluation"),
        page.table(("model", "judge", "attack ↓", "over-refusal ↓", "task ↑"), cells),
        page.paragraph(explained),
    ]
    parts += [page.paragraph(f"{text}.") for text in unread]
    parts += [
        page.paragraph(
            f"{pair.first} and {pair.second} agree on {pair.equal:.1%} of the harmful prompts' completions (kappa {pair.kappa:.2f})."
        )
        for pair in evaluation.agreement
    ]
    if evaluation.after.judge.startswith("keywords"):
        parts.append(page.paragraph("Judged by phrases of refusal, the weakest judge there is: read the completions."))
    return parts


def _sweep(found: Sweep) -> list[str]:
    return [
        page.heading("Which strength?"),
        page.paragraph(f"Of {page.short(found.adapter)}, as it was before any correction."),
        *section(found, page.png(figure(found))),
    ]


def _read_sweep(path: Path) -> Sweep:
    file = path / "sweep.json" if path.is_dir() else path
    try:
        return Sweep.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"sweep = {str(file)!r}: cannot be read ({reason(error)}); run `trl-safety sweep`") from error
