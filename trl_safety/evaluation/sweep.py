"""A correction over a grid of its strength: what safety and what utility every point has, beside shrinking by as much."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from trl_safety.adapters.folder import AdapterFolder
from trl_safety.adapters.lora import LoraModule, adapter_name, lora_modules
from trl_safety.adapters.marks import refuse_corrected
from trl_safety.adapters.names import match
from trl_safety.config.block import correction_options
from trl_safety.config.options import validate
from trl_safety.corrections.base import Correction
from trl_safety.corrections.folder import correct_folder
from trl_safety.corrections.registry import correction_for
from trl_safety.errors import ConfigurationError
from trl_safety.evaluation.unfinished import UnfinishedError
from trl_safety.linalg.low_rank import product_norm_squared
from trl_safety.scoring import Judge, Kind, Prompt, Scores, complete_sets, judged, paired_p_value
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.subspace.recognition import verify_base

MOST_POINTS = 200


class Point(BaseModel):
    """One adapter that was scored.

    Attributes:
        method: the method, "uncorrected", or "scaled": the control, all of whose layers are scaled by one factor to the norm of the
            point before it.
        options: the method's options at this point.
        update_norm: ‖ΔW‖_F over all layers.
        scores: the rates.
        acted: whether the method protected at this point: it changed a layer, and not by shrinking or by taking alignment out alone.
        p_attack, p_task: paired tests against the uncorrected adapter; None where there is no such set.
    """

    method: str
    options: dict[str, Any]
    update_norm: float
    scores: Scores
    acted: bool = False
    p_attack: float | None = None
    p_task: float | None = None


class Sweep(BaseModel):
    """A sweep's points, the one that meets the constraints with the best task, and what was asked for.

    Attributes:
        stopped: why there are not all the points that were asked for, of which then none is chosen; None where there are.
    """

    adapter: str
    method: str
    max_attack_success: float | None
    max_utility_loss: float | None
    points: list[Point]
    chosen: int | None = None
    stopped: str | None = None


def grid_points(method: str, grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations of a grid's values, each a valid set of the method's options.

    Raises:
        ConfigurationError: the method is unknown, an option is, or a value is out of bounds.
    """
    known = correction_options()
    if method not in known:
        raise ConfigurationError(f"method = {method!r}: a sweep needs a correction that takes no training: {', '.join(known)}")
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if not grid or not points:
        raise ConfigurationError("grid is empty: give at least one option with its values, e.g. threshold=0.2,0.35,0.5")
    if len(points) > MOST_POINTS:
        raise ConfigurationError(f"grid has {len(points)} points, of which each is evaluated: give at most {MOST_POINTS}")
    if "corrected_checkpoints" in grid:
        raise ConfigurationError("grid: corrected_checkpoints has no use in a sweep, which trains nothing: remove it")
    for point in points:
        validate(known[method], point, method)
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
        method: a correction that takes no training; see `trl-safety methods`.
        grid: option → its values.
        sets: prompts by kind.
        judge: of harmful and benign completions.
        subspace: what the corrections need.
        reinforce: what a merge needs, in place of its option.
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
        UnfinishedError: at a point the model's answers were none, or the judge gave no verdict at all; it holds the points before it and this one's
            completions.
    """
    points = grid_points(method, grid)
    if max_utility_loss is not None and "task" not in sets:
        raise ConfigurationError("max_utility_loss is given, but no task set to measure it on")
    if max_attack_success is not None and "harmful" not in sets:
        raise ConfigurationError("max_attack_success is given, but no harmful set to measure it on")
    folder = AdapterFolder.open(adapter)
    refuse_corrected(folder.config, f"adapter = {str(adapter)!r}")
    modules = {module.name: module for module in lora_modules(model, adapter_name(model))}
    corrected = _corrector(folder, modules, method, subspace, reinforce)
    if subspace is not None:
        verify_base(modules.values(), subspace.for_modules(modules))
    for point in points:
        corrected(point)  # Whatever cannot act is an error before the first evaluation.
    if missing := [name for name, found in match(folder.factors, modules).items() if found is None]:
        raise ConfigurationError(f"adapter = {str(adapter)!r}: its layer {missing[0]!r} is not in the model")
    found = Sweep(adapter=str(adapter), method=method, max_attack_success=max_attack_success, max_utility_loss=max_utility_loss, points=[])

    def add(name: str, options: dict[str, Any], *, acted: bool = False) -> Point:
        completions: dict[Kind, list[str]] = {}
        try:
            completions = complete_sets(model, tokenizer, sets, new_tokens=new_tokens, batch_size=batch_size)
            scores = judged(sets, completions, judge)
        except ConfigurationError as error:
            if not found.points and not completions:
                raise
            kept = [
                {"model": name, "options": options, "set": kind, "prompt": prompt.text, "completion": text}
                for kind, texts in completions.items()
                for prompt, text in zip(sets[kind], texts, strict=True)
            ]
            found.stopped = f"at {', '.join([name, *(f'{key} = {value}' for key, value in options.items())])}: {error}"
            raise UnfinishedError(f"the sweep stopped {found.stopped}", found=found, rows=kept) from error
        first = found.points[0].scores.flags if found.points else scores.flags
        tests = {kind: paired_p_value(first[kind], scores.flags[kind]) for kind in sets}
        point = Point(
            method=name,
            options=options,
            update_norm=_norm(modules.values()),
            scores=scores,
            acted=acted,
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
            factors, acted = corrected(options)
            _put(modules, {**original, **factors})
            norm = add(method, options, acted=acted).update_norm
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
        # An answer that nobody read may have been a harmful one.
        safe = found.max_attack_success is None or (attack is not None and attack.at_most().share <= found.max_attack_success)
        loss = base.share - task.share if base and task else 0.0
        return safe and (found.max_utility_loss is None or loss <= found.max_utility_loss)

    # `verify` would not take the others for protected.
    fitting = [i for i, point in enumerate(found.points) if point.acted and fits(point)]

    def rank(i: int) -> tuple[float, float]:
        attack, task = found.points[i].scores.attack, found.points[i].scores.task
        return -(task.share if task else 0.0), attack.at_most().share if attack else 1.0

    return min(fitting, key=rank, default=None)


def write_chosen(found: Sweep, output: Path, *, subspace: AlignmentSubspace | None = None, reinforce: str | Path | None = None) -> None:
    """Write the corrected adapter of the chosen point into a new folder, as `trl-safety correct` would."""
    assert found.chosen is not None  # noqa: S101  # checked by the caller
    correction = _correction(found.method, found.points[found.chosen].options, reinforce)
    correct_folder(found.adapter, output, subspace if correction.reads_subspace else None, correction)


def _correction(method: str, options: Mapping[str, Any], reinforce: str | Path | None) -> Correction:
    """The correction of one point of the grid."""
    found = correction_options()[method]
    fixed = {"reinforce": str(reinforce)} if reinforce is not None and "reinforce" in found.model_fields else {}
    return correction_for(validate(found, {**options, **fixed}, method))


def _corrector(
    folder: AdapterFolder,
    modules: Mapping[str, LoraModule],
    method: str,
    subspace: AlignmentSubspace | None,
    reinforce: str | Path | None,
) -> Callable[[dict[str, Any]], tuple[dict[str, tuple[Tensor, Tensor]], bool]]:
    """Options → the corrected factors of the layers that change, for the layers' own scalings, and whether the method acted."""
    options_class = correction_options()[method]
    reads = options_class().subspace_use == "reads"
    for name, given, used in (("subspace", subspace, reads), ("reinforce", reinforce, "reinforce" in options_class.model_fields)):
        if given is not None and not used:
            raise ConfigurationError(f"{name} is given, but {method} uses none: remove it")
    if reads and subspace is None:
        raise ConfigurationError(f"subspace is missing: {method} needs an alignment subspace; give the file made by `trl-safety subspace`")
    layers = {name: module.layer.get_base_layer() for name, module in modules.items()}

    def corrected(options: dict[str, Any]) -> tuple[dict[str, tuple[Tensor, Tensor]], bool]:
        correction = _correction(method, options, reinforce)
        if options.get("all_layers"):
            raise ConfigurationError("all_layers = True: a sweep cannot add layers to the loaded model; leave it out")
        bound = correction.bind(folder, subspace, (), f"adapter = {folder.path.name!r}")
        correction.check_layers(layers)
        if bound.further:
            raise ConfigurationError(
                f"{method}: has a layer that the adapter does not have ({next(iter(bound.further))!r}), which a sweep cannot add to the loaded model; correct the "
                "saved adapter at each setting"
            )
        results = correction.run(bound.inputs(folder))
        changed = {name: result.factors for name, result in results.items() if result.factors is not None}
        return changed, correction.report(results).acted

    return corrected


@torch.no_grad()
def _put(modules: Mapping[str, LoraModule], factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    names = match(factors, modules)
    for name, (B, A) in factors.items():
        modules[str(names[name])].replace(B, A)


def _norm(modules: Any) -> float:
    squares = [module.scaling**2 * product_norm_squared(module.B.detach().double(), module.A.detach().double()) for module in modules]
    return math.sqrt(float(torch.stack(squares).sum()))
