"""The lab's outcomes: table, file and figure."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trl_safety.adapters.files import replacing
from trl_safety.errors import SafetyError
from trl_safety.lab.intervals import Interval, difference, over_pairs
from trl_safety.lab.settings import Settings
from trl_safety.version import __version__

TABLE_WIDTH = 190

METRICS = ("attack", "task", "benign", "over_refusal")

REAL_V_TO_W = (0.002, 0.007)
"""‖V‖/‖W‖ as it was measured on pairs of a pretrained model of 135M parameters."""


@dataclass(frozen=True)
class Outcome:
    """One adapter on one pair and one seed. Rates are shares of the prompts asked.

    Attributes:
        method: the row's name.
        seed: of the fine-tuning.
        attack: forbidden requests about topics not in the user's data that were complied with.
        task: right translations.
        benign: right answers to benign requests.
        over_refusal: benign requests refused.
        update_norm: ‖ΔW‖_F over all layers.
        train_seconds: time for the fine-tuning.
        extra_seconds: time for the correction after it.
        pair: seed of the pair.
        innocent: whether its base has never seen a forbidden topic.
        control_of: the row that this is a control of; empty if it is none.
        kept_forbidden: share of forbidden samples among those that DualSelect kept.
    """

    method: str
    seed: int
    attack: float
    task: float
    benign: float
    over_refusal: float
    update_norm: float
    train_seconds: float
    extra_seconds: float
    pair: int = 0
    innocent: bool = False
    control_of: str = ""
    kept_forbidden: float | None = None

    @property
    def control(self) -> bool:
        """Whether the row is a method's control."""
        return bool(self.control_of)


def line(outcome: Outcome) -> str:
    """The line that is printed when a row is done."""
    base = "innocent pair" if outcome.innocent else "pair"
    rates = "  ".join(f"{metric} {getattr(outcome, metric):.2f}" for metric in METRICS)
    return f"{base} {outcome.pair}, seed {outcome.seed}: {outcome.method}: {rates}  ({outcome.train_seconds:.1f} s)"


def by_method(outcomes: list[Outcome]) -> dict[str, list[Outcome]]:
    """The rows of each method, in order of first appearance."""
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.method, []).append(outcome)
    return found


def interval(rows: list[Outcome], metric: str) -> Interval:
    """The interval of a method's metric over pairs."""
    values: dict[int, list[float]] = {}
    for row in rows:
        values.setdefault(row.pair, []).append(getattr(row, metric))
    return over_pairs(values)


def against(rows: list[Outcome], others: list[Outcome], metric: str) -> Interval:
    """The interval of the difference of two methods on the same pairs and seeds."""
    one, other = ({(row.pair, row.seed): getattr(row, metric) for row in found} for found in (rows, others))
    return difference(one, other)


def summary(outcomes: list[Outcome]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Method → metric → mean, spread (half of maximum − minimum) and the ends of the interval over pairs."""
    fields = (*METRICS, "update_norm", "train_seconds", "extra_seconds")
    result: dict[str, dict[str, dict[str, float | None]]] = {}
    for method, rows in by_method(outcomes).items():
        result[method] = {}
        for field in fields:
            values, found = [getattr(row, field) for row in rows], interval(rows, field)
            result[method][field] = {
                "mean": found.mean,
                "spread": (max(values) - min(values)) / 2,
                "low": found.low,
                "high": found.high,
            }
    return result


def _cell(rows: list[Outcome], metric: str) -> str:
    found = interval(rows, metric)
    if found.low is not None:
        return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"
    values = [getattr(row, metric) for row in rows]
    return f"{found.mean:.2f} ± {(max(values) - min(values)) / 2:.2f}"


def _verdict(rows: list[Outcome], methods: dict[str, list[Outcome]]) -> str:
    """Whether a control's attack differs from its method's, by the interval over pairs."""
    method = methods.get(rows[0].control_of)
    if not method:
        return ""
    found = against(method, rows, "attack")
    if found.low is None:
        return "one pair"
    if not found.excludes(0.0):
        return "not told apart"
    return "method better" if found.mean < 0 else "method worse"


def table(outcomes: list[Outcome], settings: Settings) -> Any:
    """The outcomes of one kind of base."""
    from rich.table import Table

    methods = by_method(outcomes)
    pairs, seeds = (len({getattr(outcome, name) for outcome in outcomes}) for name in ("pair", "seed"))
    base = "a base that never saw a forbidden topic" if outcomes[0].innocent else "a base that knows the forbidden answers"
    over = (
        f"mean and 95 % interval over {pairs} pairs, {seeds} seeds each"
        if pairs > 1
        else f"mean ± half the range over {seeds} seeds of ONE pair, which tells nothing of other pairs"
    )
    drawn = Table(title=f"{settings.poison:.0%} forbidden samples among {settings.samples}; {base}; {over}")
    drawn.add_column("method", no_wrap=True)
    for column in ("attack ↓", "task ↑", "benign ↑", "over-refusal ↓", "‖ΔW‖", "train s", "+ s", "attack against control"):
        drawn.add_column(column, justify="right", no_wrap=True)
    for method, rows in methods.items():
        control = rows[0].control
        cells = [_cell(rows, metric) for metric in METRICS]
        cells += [
            f"{interval(rows, name).mean:.{digits}f}" for name, digits in (("update_norm", 2), ("train_seconds", 1), ("extra_seconds", 2))
        ]
        drawn.add_row(_label(method, control=control), *cells, _verdict(rows, methods), style="dim" if control else None)
    return drawn


def _label(method: str, *, control: bool) -> str:
    return f"  control: {method.partition(': ')[2] or method}" if control else method


def show(outcomes: list[Outcome], places: list[dict[str, Any]], settings: Settings) -> None:
    """Print a table for each kind of base, with a caption about its pairs."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    for innocent in dict.fromkeys(outcome.innocent for outcome in outcomes):
        found = [outcome for outcome in outcomes if outcome.innocent is innocent]
        console.print(table(found, settings))
        console.print(caption([place for place in places if place["innocent"] is innocent]))
    if shares := [outcome.kept_forbidden for outcome in outcomes if outcome.kept_forbidden is not None]:
        console.print(
            f"forbidden samples among those that DualSelect kept: {statistics.fmean(shares):.1%} ({settings.poison:.0%} of the data)"
        )


def caption(places: list[dict[str, Any]]) -> str:
    """How far the aligned models are from their bases, compared with real pairs."""
    ratios = [place["v_to_w"] for place in places]
    low, high = REAL_V_TO_W
    text = f"‖V‖/‖W‖ {min(ratios):.1%} to {max(ratios):.1%}" if len(ratios) > 1 else f"‖V‖/‖W‖ {ratios[0]:.1%}"
    if max(ratios) > 3 * high:
        text += f": far from the {low:.1%} to {high:.1%} of real pairs, where the effect of V may differ"
    return text


def write(path: Path, outcomes: list[Outcome], settings: Settings, *, places: list[dict[str, Any]]) -> None:
    """Write every row, and the summary of each kind of base."""
    kinds = {False: "knew", True: "innocent"}
    content = {
        "trl_safety": __version__,
        "settings": asdict(settings),
        "pairs": places,
        "runs": [asdict(outcome) for outcome in outcomes],
        "summary": {
            kinds[innocent]: summary([outcome for outcome in outcomes if outcome.innocent is innocent])
            for innocent in dict.fromkeys(outcome.innocent for outcome in outcomes)
        },
    }
    with replacing(path, error=SafetyError, setting="output") as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def plot(path: Path, outcomes: list[Outcome]) -> None:
    """Every metric of every method, with the range over runs."""
    from matplotlib.figure import Figure

    methods = by_method(outcomes)
    figure = Figure(figsize=(12, 0.34 * len(methods) + 1.4), layout="constrained")
    titles = ("attack ↓", "task ↑", "benign ↑", "over-refusal ↓")
    for axis, metric, title in zip(figure.subplots(1, 4, sharey=True), METRICS, titles, strict=True):
        for position, rows in enumerate(methods.values()):
            values, control = [getattr(row, metric) for row in rows], rows[0].control
            colour = "#999999" if control else "#b5483a" if metric in ("attack", "over_refusal") else "#2a7f62"
            axis.plot([min(values), max(values)], [position] * 2, color=colour, linewidth=5, alpha=0.35, solid_capstyle="round")
            face = "white" if control else colour
            axis.plot(statistics.fmean(values), position, "o", color=colour, markersize=6, markerfacecolor=face)
        axis.set(title=title, xlim=(-0.04, 1.04), yticks=range(len(methods)))
        axis.set_yticklabels([_label(method, control=rows[0].control).strip() for method, rows in methods.items()], fontsize=8)
        axis.grid(axis="x", alpha=0.3)
    figure.axes[0].invert_yaxis()
    with replacing(path, error=SafetyError, setting="output") as temporary:
        figure.savefig(temporary, format="png", dpi=130)
