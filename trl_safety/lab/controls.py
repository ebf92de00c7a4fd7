"""The lab's controls: an equally small update, without the method."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from trl_safety.adapters.lora import lora_modules
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.training.factor_groups import update_norm

if TYPE_CHECKING:
    from trl_safety.lab.results import Outcome
    from trl_safety.reports.report import SafetyReport


@torch.no_grad()
def shrink_like(model: Any, report: SafetyReport) -> None:
    """Scale each corrected layer by the factor by which the correction changed its norm."""
    layers = report.methods[-1].layers
    for module in lora_modules(model):
        row = layers[module.name]
        if row.action == "corrected":
            module.B.mul_(row.measured["corrected_norm"] / row.measured["update_norm"])


@torch.no_grad()
def shrink_to(model: Any, norm: float) -> None:
    """Scale all layers of an adapter by one factor, so that ‖ΔW‖_F over all of them is `norm`."""
    modules = lora_modules(model)
    factor = norm / update_norm(modules)
    for module in modules:
        module.B.mul_(factor)


@torch.no_grad()
def scale(model: Any, factor: float) -> None:
    """Scale the whole update."""
    for module in lora_modules(model):
        module.B.mul_(factor)


def random_like(subspace: AlignmentSubspace, seed: int) -> AlignmentSubspace:
    """Random singular vectors with V's singular values, in every layer."""
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(like: torch.Tensor) -> torch.Tensor:
        basis, _ = torch.linalg.qr(torch.randn(like.shape, generator=generator))
        return torch.Tensor(basis).to(like)

    layers = {}
    for name, layer in subspace.layers.items():
        left, _, right = layer.factors()
        layers[name] = dataclasses.replace(layer, left=orthonormal(left), right=orthonormal(right))
    return AlignmentSubspace(layers, subspace.provenance)


def without_direction(subspace: AlignmentSubspace) -> AlignmentSubspace:
    """The subspace with C = 0, which makes AsFT's penalty plain L2 on ΔW."""
    layers = {name: dataclasses.replace(layer, singular_values=torch.zeros(layer.rank)) for name, layer in subspace.layers.items()}
    return AlignmentSubspace(layers, subspace.provenance)


def search(train: Callable[[float], Outcome], target: float, *, start: float, runs: int, tolerance: float) -> Outcome:
    """The outcome whose ‖ΔW‖ comes closest to the target's, over a few weights of a penalty.

    Args:
        train: trains with a given weight.
        target: the norm to meet.
        start: the first weight.
        runs: maximum number of trainings, at least one.
        tolerance: difference of the norms' logarithms at which it stops.
    """
    tried: list[tuple[float, Outcome]] = []
    guess = start
    for _ in range(runs):
        tried.append((guess, train(guess)))
        tried.sort(key=lambda pair: abs(_log_ratio(pair[1], target)))
        if abs(_log_ratio(tried[0][1], target)) <= tolerance:
            break
        guess = _next_weight(tried, target)
    return tried[0][1]


def _log_ratio(outcome: Outcome, target: float) -> float:
    return math.log(max(outcome.update_norm, 1e-9) / max(target, 1e-9))


def _next_weight(tried: list[tuple[float, Outcome]], target: float) -> float:
    """The weight at which the norm, modelled as a power of the weight, equals the target's: the secant method on logarithms."""
    (weight, outcome), *rest = tried
    slope = -0.5
    if rest and rest[0][0] != weight:
        other_weight, other = rest[0]
        measured = math.log(max(outcome.update_norm, 1e-9) / max(other.update_norm, 1e-9)) / math.log(weight / other_weight)
        slope = measured if measured < -0.05 else slope
    return weight * math.exp(max(-2.0, min(2.0, -_log_ratio(outcome, target) / slope)))
