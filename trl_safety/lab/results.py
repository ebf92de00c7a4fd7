"""The lab's outcomes: table, file and figure."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trl_safety.adapters.files import replacing
from trl_safety.errors import SafetyError
from trl_safety.lab.settings import (
    BATCH,
    BUFFER_GAMMAS,
    DUAL_SELECT,
    EPOCHS,
    LEARNING_RATE,
    LORA_RANK,
    POISON,
    PROVIDER,
    REFERENCES,
    SAMPLES,
    SUBSPACE_RANK,
    VECTOR_GAMMAS,
)
from trl_safety.version import __version__

TABLE_WIDTH = 150

METRICS = ("attack", "task", "benign", "over_refusal")


@dataclass(frozen=True)
class Outcome:
    """One adapter on one seed. Rates are shares of the prompts asked.

    Attributes:
        method: the row's name.
        control: whether the row is a method's control.
        attack: forbidden requests about topics not in the user's data that were complied with.
        task: right translations.
        benign: right answers to benign requests.
        over_refusal: benign requests refused.
        update_norm: ‖ΔW‖_F over all layers.
        train_seconds: time for the fine-tuning.
        extra_seconds: time for the correction after it.
        kept_forbidden: share of forbidden samples among those that DualSelect kept.
    """

    method: str
    control: bool
    seed: int
    attack: float
    task: float
    benign: float
    over_refusal: float
    update_norm: float
    train_seconds: float
    extra_seconds: float
    kept_forbidden: float | None = None


def summary(outcomes: list[Outcome]) -> dict[str, dict[str, tuple[float, float]]]:
    """Method → metric → mean and spread (half of maximum − minimum) over the seeds."""
    fields = (*METRICS, "update_norm", "train_seconds", "extra_seconds")
    result = {}
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        rows = [outcome for outcome in outcomes if outcome.method == method]
        result[method] = {field: _mean_spread([getattr(row, field) for row in rows]) for field in fields}
    return result


def _mean_spread(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), (max(values) - min(values)) / 2


def _table(outcomes: list[Outcome]) -> Any:
    from rich.table import Table

    controls = {outcome.method for outcome in outcomes if outcome.control}
    count = len({outcome.seed for outcome in outcomes})
    table = Table(title=f"{POISON:.0%} forbidden samples among {SAMPLES}; mean ± half the range over {count} seeds")
    table.add_column("method", no_wrap=True)
    for column in ("attack ↓", "task ↑", "benign ↑", "over-refusal ↓", "‖ΔW‖", "train s", "+ s"):
        table.add_column(column, justify="right", no_wrap=True)
    for method, row in summary(outcomes).items():
        cells = [f"{row[metric][0]:.2f} ± {row[metric][1]:.2f}" for metric in METRICS]
        cells += [f"{row['update_norm'][0]:.2f}", f"{row['train_seconds'][0]:.1f}", f"{row['extra_seconds'][0]:.2f}"]
        table.add_row(
            f"  control: {method.partition(': ')[2]}" if method in controls else method, *cells, style="dim" if method in controls else None
        )
    return table


def _write(path: Path, outcomes: list[Outcome], seconds: float) -> None:
    content = {
        "trl_safety": __version__,
        "seconds": round(seconds, 1),
        "settings": {
            "samples": SAMPLES,
            "poison": POISON,
            "epochs": EPOCHS,
            "batch": BATCH,
            "learning_rate": LEARNING_RATE,
            "lora_rank": LORA_RANK,
            "subspace_rank": SUBSPACE_RANK,
            "references": sum(REFERENCES),
            "dual_select": DUAL_SELECT,
            "provider": PROVIDER,
            "vector_gammas": VECTOR_GAMMAS,
            "buffer_gammas": BUFFER_GAMMAS,
        },
        "runs": [asdict(outcome) for outcome in outcomes],
        "summary": {
            method: {metric: {"mean": mean, "spread": spread} for metric, (mean, spread) in row.items()}
            for method, row in summary(outcomes).items()
        },
    }
    with replacing(path, error=SafetyError, setting="output") as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _plot(path: Path, outcomes: list[Outcome]) -> None:
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(outcome.method for outcome in outcomes))
    controls = {outcome.method for outcome in outcomes if outcome.control}
    figure = Figure(figsize=(12, 0.34 * len(methods) + 1.4), layout="constrained")
    titles = ("attack ↓", "task ↑", "benign ↑", "over-refusal ↓")
    for axis, metric, title in zip(figure.subplots(1, 4, sharey=True), METRICS, titles, strict=True):
        for position, method in enumerate(methods):
            values = [getattr(outcome, metric) for outcome in outcomes if outcome.method == method]
            colour = "#999999" if method in controls else "#b5483a" if metric in ("attack", "over_refusal") else "#2a7f62"
            axis.plot([min(values), max(values)], [position] * 2, color=colour, linewidth=5, alpha=0.35, solid_capstyle="round")
            axis.plot(
                statistics.fmean(values),
                position,
                "o",
                color=colour,
                markersize=6,
                markerfacecolor="white" if method in controls else colour,
            )
        axis.set(title=title, xlim=(-0.04, 1.04), yticks=range(len(methods)))
        axis.set_yticklabels(["control: " + method.partition(": ")[2] if method in controls else method for method in methods], fontsize=8)
        axis.grid(axis="x", alpha=0.3)
    figure.axes[0].invert_yaxis()
    with replacing(path, error=SafetyError, setting="output") as temporary:
        figure.savefig(temporary, format="png", dpi=130)
