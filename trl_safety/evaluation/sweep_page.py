"""A sweep's table, figure and page."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trl_safety.adapters.files import replacing
from trl_safety.errors import SafetyError
from trl_safety.evaluation import page
from trl_safety.evaluation.sweep import Point, Sweep
from trl_safety.scoring import Scores

HEADINGS = ("#", "method", "options", "attack ↓", "over-refusal ↓", "task ↑", "‖ΔW‖", "p (attack)", "p (task)")


def _label(point: Point) -> str:
    return ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in point.options.items())


def _numbers(found: Sweep) -> list[int]:
    """Of every point, which setting of the grid it is, or is the control of; 0 for the uncorrected adapter."""
    return list(itertools.accumulate(int(point.method == found.method) for point in found.points))


def rows(found: Sweep) -> Iterator[list[str]]:
    """The table's cells: the setting's number, method, options, the rates, ‖ΔW‖, and the paired tests against the uncorrected adapter."""
    for i, (number, point) in enumerate(zip(_numbers(found), found.points, strict=True)):
        cells = ["–" if rate is None else str(rate) for rate in (point.scores.attack, point.scores.over_refusal, point.scores.task)]
        tests = ["–" if p is None or i == 0 else p_text(p) for p in (point.p_attack, point.p_task)]
        shown = f"control {number}" if point.method == "scaled" else str(number or "")
        yield [shown, point.method + (" ← chosen" if i == found.chosen else ""), _label(point), *cells, f"{point.update_norm:.3g}", *tests]


def p_text(p: float) -> str:
    """A p-value for a table."""
    return "<0.001" if p < 0.001 else f"{p:.2g}"


def figure(found: Sweep) -> Any:
    """Safety against utility: attack over task (or over ‖ΔW‖ where there is no task set), numbered as in the table, with the controls."""
    from matplotlib.figure import Figure

    chart = Figure(figsize=(7, 5.5), layout="constrained")
    axis = chart.subplots()

    def across(point: Point) -> float:
        return point.scores.task.share if point.scores.task else point.update_norm

    placed = [
        (number, point.method, across(point), point.scores.attack.share)
        for number, point in zip(_numbers(found), found.points, strict=True)
        if point.scores.attack
    ]
    # Settings that differ in several options have no order to draw a line in.
    line = "-" if all(len(point.options) == 1 for point in found.points[1:]) else "none"
    styles = {
        "scaled": ("control of the same number: the update scaled to its norm", "#888888", "s", 11),
        found.method: (found.method, "#2a7f62", "o", 12),
        "uncorrected": ("uncorrected", "#b5483a", "X", 7),
    }
    for method, (label, colour, marker, size) in styles.items():
        shown = [(number, x, y) for number, of, x, y in placed if of == method]
        joined = line if len(shown) > 1 else "none"
        axis.plot([x for _, x, _ in shown], [y for *_, y in shown], marker, color=colour, linestyle=joined, markersize=size, label=label)
        for number, x, y in shown if method != "uncorrected" else ():
            # At the lines' zorder a marker drawn later covers the number along with its marker.
            axis.annotate(str(number), (x, y), ha="center", va="center", color="white", fontsize=7, zorder=2)
    for setting in {number for number, *_ in placed}:
        pair = [(x, y) for number, _, x, y in placed if number == setting]
        axis.plot([x for x, _ in pair], [y for _, y in pair], ":", color="#555555", linewidth=1, zorder=1)
    if found.chosen is not None and (attack := found.points[found.chosen].scores.attack):
        axis.plot(
            across(found.points[found.chosen]),
            attack.share,
            "o",
            markersize=17,
            markerfacecolor="none",
            color="black",
            linestyle="none",
            label="chosen",
        )
    axis.set(xlabel=_across(found), ylabel="attack ↓", ylim=(-0.03, 1.03), title=_title(found))
    axis.grid(alpha=0.3)
    chart.legend(loc="outside lower center", ncols=2, fontsize=7, markerscale=0.6)
    return chart


def _across(found: Sweep) -> str:
    return "task ↑" if found.points[0].scores.task else "‖ΔW‖"


def _title(found: Sweep) -> str:
    return f"Sweep of {found.method} on {Path(found.adapter).name}"


def write_results(found: Sweep, output: Path) -> None:
    """`sweep.json`, `sweep.png` and the self-contained `sweep.html` in a new folder.

    Raises:
        SafetyError: the folder cannot be written to.
    """
    drawn = page.png(figure(found))
    contents = {
        "sweep.json": (json.dumps(found.model_dump(), indent=1, ensure_ascii=False) + "\n").encode(),
        "sweep.png": drawn,
        "sweep.html": _page(found, drawn).encode(),
    }
    for name, content in contents.items():
        with replacing(output / name, error=SafetyError, setting="output") as temporary:
            temporary.write_bytes(content)


def _page(found: Sweep, drawn: bytes) -> str:
    return page.page(_title(found), *section(found, drawn))


def section(found: Sweep, drawn: bytes) -> list[str]:
    """What a page says of a sweep: what was chosen, whether plain scaling does as well, the picture, the table and how to read them."""
    if found.stopped is not None:
        verdict = f"Not finished, so none was chosen: the sweep stopped {found.stopped}."
    elif found.chosen is not None:
        verdict = f"Chosen: {_numbers(found)[found.chosen]} ({_label(found.points[found.chosen])})."
    elif found.max_attack_success is None and found.max_utility_loss is None:
        verdict = "No constraint was given, so none was chosen."
    else:
        verdict = "No setting meets the constraints."
    wanted = [
        f"attack at most {found.max_attack_success:g}" if found.max_attack_success is not None else "",
        f"task at most {found.max_utility_loss:g} below the uncorrected adapter's" if found.max_utility_loss is not None else "",
    ]
    judge = found.points[0].scores.judge
    return [
        page.paragraph(" ".join([verdict, *(f"Asked for: {part}." for part in wanted if part)])),
        page.paragraph(_finding(found)),
        page.picture(drawn, f"attack against {_across(found)}, numbered as in the table"),
        page.paragraph(
            f"{rates_explained(found.points[0].scores)} p: exact McNemar test against the uncorrected adapter on the same prompts. The control is the uncorrected "
            f"adapter scaled to the same ‖ΔW‖. Judge: {judge}{', phrases of refusal, the weakest there is' if judge == 'keywords' else ''}."
        ),
        page.table(HEADINGS, rows(found)),
    ]


def rates_explained(scores: Scores) -> str:
    """What the rates of a table count, of how many prompts."""
    counted = {
        "attack: harmful prompts complied with": scores.attack,
        "over-refusal: benign prompts refused, by phrases where the judge knows harm alone": scores.over_refusal,
        "task: prompts answered right": scores.task,
    }
    return f"{'; '.join(f'{text} (n = {rate.count})' for text, rate in counted.items() if rate)}. In brackets: Wilson intervals at 95 %."


def _finding(found: Sweep) -> str:
    """How many settings a control is at least as good as, in attack and task, and better in one."""
    rates = [(p.scores.attack.share, -p.scores.task.share) if p.scores.attack and p.scores.task else None for p in found.points]
    controls = [rate for rate, point in zip(rates, found.points, strict=True) if point.method == "scaled"]
    if not controls:
        return "No control was scored: whether plain scaling does as well is not known."
    if rates[0] is None:
        return "Whether plain scaling does as well is not known: that takes a harmful set and a task set."
    settings = [i for i, point in enumerate(found.points) if point.method == found.method]
    beaten = [i for i in settings if any(_better(control, rates[i]) for control in controls)]
    chosen = "" if found.chosen is None else ", the chosen one among them" if found.chosen in beaten else ", not the chosen one"
    return f"Matched or beaten on both attack and task by plain scaling (a control), as measured: {len(beaten)} of {len(settings)} settings{chosen}."


def _better(one: tuple[float, float] | None, other: tuple[float, float] | None) -> bool:
    """Whether each of the first's is at most the second's, and one is less."""
    return one is not None and other is not None and one != other and one[0] <= other[0] and one[1] <= other[1]
