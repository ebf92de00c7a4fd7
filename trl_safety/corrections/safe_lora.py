"""Safe LoRA as a correction, a callback and a function on a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trl_safety.config.safe_lora import SafeLoraConfig
from trl_safety.corrections.base import LayerInput, LayerResult, on_host
from trl_safety.corrections.callback import NamedCallback
from trl_safety.corrections.on_subspace import SubspaceCorrection
from trl_safety.corrections.registry import correct_by_name
from trl_safety.methods import safe_lora
from trl_safety.reports.report import LayerReport, SafetyReport
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.subspace.layer import LayerSubspace


class SafeLoraCorrection(SubspaceCorrection):
    """B ← M·B in the layers whose update is least aligned."""

    name = "safe_lora"
    config: SafeLoraConfig

    def check(self, layers: Mapping[str, LayerSubspace]) -> None:
        """Check that every layer's operator exists and differs from the identity."""
        for layer in layers.values():
            layer.operator(self.config.operator)

    def run(self, layers: Sequence[LayerInput]) -> dict[str, LayerResult]:
        """Measure all layers, select, and project, with one transfer to the host."""
        projected, rows = [], []
        for layer in layers:
            B, A = layer.factors()
            image = safe_lora.project(B, layer.subspace.operator(self.config.operator).to(B.device, B.dtype))
            rows.append(torch.stack(safe_lora.cosine(image, B, A)))
            projected.append(layer.cast(image, A)[0])
        measured = on_host(rows)
        # A layer without an update has nothing to correct, so it does not count as one of the K.
        cosines = measured[:, 0].where(measured[:, 1] > 0, torch.inf) if self.config.layers is not None else measured[:, 0]
        chosen = safe_lora.select(cosines, threshold=self.config.threshold, layers=self.config.layers).tolist()
        spared = "cosine above the threshold"
        if self.config.layers is not None:
            spared = f"not among the {self.config.layers} layers with the smallest cosine"
        results = {}
        for layer, image, (cosine, norm, image_norm), act in zip(layers, projected, measured.tolist(), chosen, strict=True):
            row = {"cosine": cosine, "update_norm": norm * layer.scaling}
            if act and norm > 0:
                row["corrected_norm"] = image_norm * layer.scaling
                results[layer.name] = LayerResult(LayerReport(action="corrected", measured=row), (image, layer.stored[1]))
            else:
                reason = "the update is zero" if norm == 0 else spared
                results[layer.name] = LayerResult(LayerReport(action="left_alone", reason=reason, measured=row), None)
        return results

    def summary(self, results: Mapping[str, LayerReport]) -> str:
        """How many layers were corrected, and how much of their update remains."""
        corrected = [report for report in results.values() if report.action == "corrected"]
        choice = (
            f"cosine ≤ {self.config.threshold}"
            if self.config.layers is None
            else f"the {min(self.config.layers, len(results))} smallest cosines"
        )
        if not corrected:
            return f"no layer met {choice}: the adapter is as it was trained"
        before = sum(report.measured["update_norm"] ** 2 for report in corrected) ** 0.5
        after = sum(report.measured["corrected_norm"] ** 2 for report in corrected) ** 0.5
        return f"{len(corrected)} of {len(results)} layers corrected ({choice}); their ‖ΔW‖ went from {before:.3g} to {after:.3g}"


class SafeLoRACallback(NamedCallback):
    """Safe LoRA (arXiv 2405.16833) at the end of training, for any Transformers `Trainer` on a PEFT model.

    Checks at the start of training that it can act. The keywords are the fields of `SafeLoraConfig`; see `NamedCallback`.
    """

    options = SafeLoraConfig
    name = "safe_lora"


def apply_safe_lora(
    model: nn.Module, subspace: AlignmentSubspace, *, skip_modules: Iterable[str] = (), adapter: str | None = None, **options: Any
) -> SafetyReport:
    """Correct a PEFT model's adapter in place with Safe LoRA (arXiv 2405.16833). The next save also writes its report.

    A short form of `trl_safety.correct(model, subspace, SafeLoraConfig(...))`, with the same return value and errors.

    Args:
        model: with one active LoRA adapter, trained.
        subspace: must hold every adapted layer.
        skip_modules: modules to leave alone.
        adapter: the adapter's name; by default the active one.
        **options: the fields of `SafeLoraConfig`.
    """
    return correct_by_name(model, subspace, SafeLoraConfig, "safe_lora", options, skip_modules, adapter)
