"""A correction over a grid of its strength: what safety and what utility every point has, beside shrinking by as much."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from trl_safety.adapters.files import replacing
from trl_safety.adapters.folder import AdapterFolder
from trl_safety.adapters.lora import LoraModule, adapter_name, lora_modules, refuse_corrected
from trl_safety.adapters.names import match
from trl_safety.adapters.record import open_kind
from trl_safety.adapters.subspace import AlignmentSubspace
from trl_safety.config import AlignmentVectorConfig, CorrectionConfig, CsuloraConfig, ReinforceMergeConfig, SafeLoraConfig, validate
from trl_safety.errors import ConfigurationError, SafetyError
from trl_safety.evaluation import page
from trl_safety.linalg.low_rank import product_norm_squared
from trl_safety.training.buffer_reinforce import merge_layers, merge_reinforce
from trl_safety.training.correction import LayerInput, correct_folder
from trl_safety.training.mixin import correction_for
from trl_safety.training.scoring import Judge, Kind, Prompt, Scores, paired_p_value, score

METHODS: dict[str, type[Any]] = {
    "safe_lora": SafeLoraConfig,
    "csulora": CsuloraConfig,
    "alignment_vector": AlignmentVectorConfig,
    "buffer_reinforce": ReinforceMergeConfig,
}
MOST_POINTS = 200


class Point(BaseModel):
    """One adapter that was scored.

    Attributes:
        method: the method, "uncorrected", or "scaled": the control, all of whose layers are scaled by one factor to the norm of the
            point before it.
        options: the method's options at this point.
        update_norm: ‖ΔW‖_F over all layers.
        scores: the rates.
        p_attack, p_task: paired tests against the uncorrected adapter; None where there is no such set.
    """

    method: str
    options: dict[str, Any]
    update_norm: float
    scores: Scores
    p_attack: float | None = None
    p_task: float | None = None


class Sweep(BaseModel):
    """A sweep's points, the one that meets the constraints with the best task, and what was asked for."""

    adapter: str
    method: str
    max_attack_success: float | None
    max_utility_loss: float | None
    points: list[Point]
    chosen: int | None = None


def grid_points(method: str, grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations of a grid's values, each a valid set of the method's options.

    Raises:
        ConfigurationError: the method is unknown, an option is, or a value is out of bounds.
    """
    if method not in METHODS:
        raise ConfigurationError(f"method = {method!r}: a sweep needs a correction that takes no training: {', '.join(METHODS)}")
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if not grid or not points:
        raise ConfigurationError("grid is empty: give at least one option with its values, e.g. threshold=0.2,0.35,0.5")
    if len(points) > MOST_POINTS:
        raise ConfigurationError(f"grid has {len(points)} points, of which each is evaluated: give at most {MOST_POINTS}")
    for point in points:
        validate(METHODS[method], point, method)
    return points


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`["gamma=0.5,1", "rank=8,16"]` → a grid. Numbers, true, false and null are read as JSON, anything else as text.

    Raises:
        ConfigurationError: a text is not of this form, or names an option twice.
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip()
        if not equals or not name or not values.strip() or name in grid:
            raise ConfigurationError(f"grid = {text!r}: expected OPTION=V1,V2,… with every option once, e.g. threshold=0.2,0.35,0.5")
        grid[name] = [_value(value.strip()) for value in values.split(",")]
    return grid


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def sweep(
    model: Any,
    tokenizer: Any,
    adapter: str | Path,
    method: str,
    grid: Mapping[str, Sequence[Any]],
    sets: Mapping[Kind, Sequence[Prompt]],
    judge: Judge,
    *,
    subspace: AlignmentSubspace | None = None,
    reinforce: str | Path | None = None,
    controls: bool = True,
    max_attack_success: float | None = None,
    max_utility_loss: float | None = None,
    new_tokens: int = 64,
    batch_size: int = 32,
    progress: Callable[[Point], None] = lambda point: None,
) -> Sweep:
    """Score an adapter under a method at every point of a grid, without loading the model again.

    Args:
        model: the aligned model with the adapter loaded (`PeftModel`), of which only the adapter's factors change. They are put
            back at the end.
        tokenizer: the model's.
        adapter: the adapter's folder, uncorrected.
        method: `safe_lora`, `csulora`, `alignment_vector` or `buffer_reinforce` (the merge).
        grid: option → its values.
        sets: prompts by kind.
        judge: of harmful and benign completions.
        subspace: what the corrections need.
        reinforce: what the merge needs.
        controls: also score every point's control, the uncorrected adapter scaled to the same ‖ΔW‖.
        max_attack_success: the chosen point's attack rate is at most this.
        max_utility_loss: its task rate is at most this below the uncorrected adapter's.
        new_tokens: length of completions.
        batch_size: prompts at a time.
        progress: told of every point.

    Raises:
        ConfigurationError: the grid is wrong, or what the method or a constraint needs is missing.
        AdapterError: the adapter was corrected before, or is not the model's.
        SubspaceError: an adapted layer is not in the subspace.
    """
    points = grid_points(method, grid)
    if max_utility_loss is not None and "task" not in sets:
        raise ConfigurationError("max_utility_loss is given, but no task set to measure it on")
    if max_attack_success is not None and "harmful" not in sets:
        raise ConfigurationError("max_attack_success is given, but no harmful set to measure it on")
    folder = AdapterFolder.open(adapter)
    refuse_corrected(folder.config, f"adapter = {str(adapter)!r}")
    corrected = _corrector(folder, method, subspace, reinforce)
    for point in points:
        corrected(point)  # Whatever cannot act is an error before the first evaluation.
    modules = {module.name: module for module in lora_modules(model, adapter_name(model))}
    if missing := [name for name, found in match(folder.factors, modules).items() if found is None]:
        raise ConfigurationError(f"adapter = {str(adapter)!r}: its layer {missing[0]!r} is not in the model")
    found = Sweep(adapter=str(adapter), method=method, max_attack_success=max_attack_success, max_utility_loss=max_utility_loss, points=[])

    def add(name: str, options: dict[str, Any]) -> Point:
        scores, _ = score(model, tokenizer, sets, judge, new_tokens=new_tokens, batch_size=batch_size)
        first = found.points[0].scores.flags if found.points else scores.flags
        tests = {kind: paired_p_value(first[kind], scores.flags[kind]) for kind in sets}
        point = Point(
            method=name,
            options=options,
            update_norm=_norm(modules.values()),
            scores=scores,
            p_attack=tests.get("harmful"),
            p_task=tests.get("task"),
        )
        found.points.append(point)
        progress(point)
        return point

    original = {name: (factors.B, factors.A) for name, factors in folder.factors.items()}
    try:
        _put(modules, original)
        whole = add("uncorrected", {}).update_norm
        for options in points:
            _put(modules, {**original, **corrected(options)})
            norm = add(method, options).update_norm
            if controls and whole:
                _put(modules, {name: (B * (norm / whole), A) for name, (B, A) in original.items()})
                add("scaled", options)
    finally:
        _put(modules, original)
    return found.model_copy(update={"chosen": choose(found)})


def choose(found: Sweep) -> int | None:
    """The method's point that meets both constraints with the best task (then the lowest attack); None without constraints or such a point."""
    if found.max_attack_success is None and found.max_utility_loss is None:
        return None
    base = found.points[0].scores.task

    def fits(point: Point) -> bool:
        attack, task = point.scores.attack, point.scores.task
        safe = found.max_attack_success is None or (attack is not None and attack.share <= found.max_attack_success)
        loss = base.share - task.share if base and task else 0.0
        return safe and (found.max_utility_loss is None or loss <= found.max_utility_loss)

    fitting = [i for i, point in enumerate(found.points) if point.method == found.method and fits(point)]

    def rank(i: int) -> tuple[float, float]:
        attack, task = found.points[i].scores.attack, found.points[i].scores.task
        return -(task.share if task else 0.0), attack.share if attack else 0.0

    return min(fitting, key=rank, default=None)


def write_chosen(found: Sweep, output: Path, *, subspace: AlignmentSubspace | None = None, reinforce: str | Path | None = None) -> None:
    """Write the corrected adapter of the chosen point into a new folder, as `trl-safety correct` would."""
    assert found.chosen is not None  # noqa: S101  # checked by the caller
    options = found.points[found.chosen].options
    if found.method == "buffer_reinforce":
        assert reinforce is not None  # noqa: S101  # without it there is no sweep
        merge_reinforce(found.adapter, reinforce, output, **options)
        return
    assert subspace is not None  # noqa: S101
    correct_folder(found.adapter, output, subspace, correction_for(validate(METHODS[found.method], options, found.method)))


def _corrector(
    folder: AdapterFolder, method: str, subspace: AlignmentSubspace | None, reinforce: str | Path | None
) -> Callable[[dict[str, Any]], dict[str, tuple[Tensor, Tensor]]]:
    """Options → the corrected factors of the layers that change, for the layers' own scalings."""
    if method == "buffer_reinforce":
        if reinforce is None:
            raise ConfigurationError("reinforce is missing: a sweep of buffer_reinforce merges with a ReinforceLoRA; name it")
        other, _ = open_kind(reinforce, "reinforce", "reinforce")
        if further := [name for name, found in match(other.factors, folder.factors).items() if found is None]:
            raise ConfigurationError(
                f"reinforce = {str(reinforce)!r}: has a layer that the adapter does not have ({further[0]!r}), which a sweep cannot add to the loaded model; "
                "use `trl-safety merge-reinforce` at each setting"
            )
        names = match(other.factors, folder.factors)
        renamed = {str(names[name]): factors for name, factors in other.factors.items()}
        scalings = {name: factors.scaling for name, factors in folder.factors.items()}

        def merged(options: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
            config = validate(ReinforceMergeConfig, options, method)
            merges = merge_layers(folder.factors, renamed, config, scalings, torch.device("cpu"))
            return {name: (merge.B, merge.A) for name, merge in merges.items()}

        return merged
    if subspace is None:
        raise ConfigurationError(f"subspace is missing: {method} needs an alignment subspace; give the file made by `trl-safety subspace`")
    layers = subspace.for_modules(folder.factors)
    inputs = [LayerInput(name, (f.B, f.A), f.scaling, layers[name], f.B.device) for name, f in folder.factors.items()]

    def corrected(options: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
        config: CorrectionConfig = validate(METHODS[method], options, method)
        if getattr(config, "all_layers", False):
            raise ConfigurationError("all_layers = True: a sweep cannot add layers to the loaded model; leave it out")
        correction = correction_for(config)
        correction.check(layers)
        return {name: result.factors for name, result in correction.run(inputs).items() if result.factors is not None}

    return corrected


@torch.no_grad()
def _put(modules: Mapping[str, LoraModule], factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    names = match(factors, modules)
    for name, (B, A) in factors.items():
        modules[str(names[name])].replace(B, A)


def _norm(modules: Any) -> float:
    squares = [module.scaling**2 * product_norm_squared(module.B.detach().double(), module.A.detach().double()) for module in modules]
    return math.sqrt(float(torch.stack(squares).sum()))


def _label(point: Point) -> str:
    return ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in point.options.items())


def rows(found: Sweep) -> Iterator[list[str]]:
    """The table's cells: method, options, attack, over-refusal, task, ‖ΔW‖, and the paired tests against the uncorrected adapter."""
    for i, point in enumerate(found.points):
        cells = ["–" if rate is None else str(rate) for rate in (point.scores.attack, point.scores.over_refusal, point.scores.task)]
        tests = ["–" if p is None or i == 0 else f"{p:.2g}" for p in (point.p_attack, point.p_task)]
        name = f"control: {point.method}" if point.method == "scaled" else point.method
        yield [name + (" ← chosen" if i == found.chosen else ""), _label(point), *cells, f"{point.update_norm:.3g}", *tests]


HEADINGS = ("", "options", "attack ↓", "over-refusal ↓", "task ↑", "‖ΔW‖", "p (attack)", "p (task)")


def figure(found: Sweep) -> Any:
    """Safety against utility: attack over task (or over ‖ΔW‖ where there is no task set), the control in the same picture."""
    from matplotlib.figure import Figure

    chart = Figure(figsize=(7, 5), layout="constrained")
    axis = chart.subplots()
    styles = {found.method: ("#2a7f62", "o"), "scaled": ("#999999", "s"), "uncorrected": ("#b5483a", "X")}
    has_task = found.points[0].scores.task is not None

    def across(point: Point) -> float:
        return point.scores.task.share if point.scores.task else point.update_norm

    for method, (colour, marker) in styles.items():
        shown = [point for point in found.points if point.method == method and point.scores.attack]
        label = "control: the update scaled to the same norm" if method == "scaled" else method
        axis.plot(
            [across(p) for p in shown],
            [p.scores.attack.share for p in shown if p.scores.attack],
            marker,
            color=colour,
            linestyle="-" if len(shown) > 1 else "none",
            alpha=0.8,
            label=label,
        )
        for point in shown if method == found.method else ():
            assert point.scores.attack is not None  # noqa: S101  # filtered above
            axis.annotate(_label(point), (across(point), point.scores.attack.share), fontsize=6, xytext=(3, 3), textcoords="offset points")
    if found.chosen is not None and (attack := found.points[found.chosen].scores.attack):
        axis.plot(
            across(found.points[found.chosen]), attack.share, "o", markersize=14, markerfacecolor="none", color="black", label="chosen"
        )
    axis.set(
        xlabel="task ↑" if has_task else "‖ΔW‖",
        ylabel="attack ↓",
        ylim=(-0.03, 1.03),
        title=f"{found.method} on {Path(found.adapter).name}",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return chart


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
    if found.chosen is not None:
        verdict = f"Chosen: {_label(found.points[found.chosen])}."
    elif found.max_attack_success is None and found.max_utility_loss is None:
        verdict = "No constraint was given."
    else:
        verdict = "No setting meets the constraints."
    wanted = [
        f"attack at most {found.max_attack_success:g}" if found.max_attack_success is not None else "",
        f"task at most {found.max_utility_loss:g} below the uncorrected adapter's" if found.max_utility_loss is not None else "",
    ]
    judge = found.points[0].scores.judge
    return page.page(
        f"{found.method} on {Path(found.adapter).name}",
        page.paragraph(" ".join([verdict, *(f"Asked for: {part}." for part in wanted if part)])),
        page.picture(drawn, "attack against task"),
        page.paragraph(
            "Rates with Wilson intervals at 95 %. p: exact McNemar test against the uncorrected adapter on the same prompts. The control is the uncorrected adapter "
            f"scaled to the same ‖ΔW‖. Judge: {judge}{', phrases of refusal, the weakest there is' if judge == 'keywords' else ''}."
        ),
        page.table(HEADINGS, rows(found)),
    )
