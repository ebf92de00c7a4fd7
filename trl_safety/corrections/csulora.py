"""CSULoRA (a reconstruction) as a correction, a callback and a function on a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trl_safety.config.csulora import CsuloraConfig
from trl_safety.corrections.base import LayerInput, LayerResult, on_host
from trl_safety.corrections.callback import NamedCallback
from trl_safety.corrections.on_subspace import SubspaceCorrection
from trl_safety.corrections.registry import correct_by_name
from trl_safety.errors import SubspaceError
from trl_safety.methods import csulora
from trl_safety.reports.report import LayerReport, SafetyReport
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.subspace.layer import LayerSubspace


class CsuloraCorrection(SubspaceCorrection):
    """ΔW ← F + M/(1 + λ_M e_M) + O/(1 + λ_O e_O)."""

    name = "csulora"
    reconstruction = True
    config: CsuloraConfig

    def check(self, layers: Mapping[str, LayerSubspace]) -> None:
        """Check that no layer's subspace is the whole space, in which case all of ΔW would be in the part that is kept."""
        for layer in layers.values():
            layer.factors()
            if layer.rank >= max(layer.shape):
                raise SubspaceError(
                    f"layer {layer.name!r} of shape {layer.shape} has a subspace of rank {layer.rank}, which is the whole space, so csulora would "
                    "change nothing; build the subspace with a smaller rank"
                )

    def keeps_ranks(self, ranks: Mapping[str, int]) -> bool:
        """Only if it is cut back."""
        return self.config.output_rank == "original"

    def run(self, layers: Sequence[LayerInput]) -> dict[str, LayerResult]:
        """Correct every layer with a non-zero update, with one transfer to the host."""
        off = self.config.lambda_partial == 0 and self.config.lambda_outside == 0
        computed, rows = [], []
        for layer in layers:
            trained_B, trained_A = layer.factors()
            left, _, right = layer.subspace.factors()
            U, Z = left.to(trained_B), right.to(trained_A)
            parts = csulora.energies(trained_B, trained_A, U, Z)
            a, b = csulora.attenuations(parts, self.config.lambda_partial, self.config.lambda_outside)
            B, A = csulora.correct(trained_B, trained_A, U, Z, a, b)
            lost = torch.zeros_like(a)
            if self.config.output_rank == "original":
                B, A, lost = csulora.cut_back(B, A, trained_A.shape[0])
            computed.append(layer.cast(B, A))
            rows.append(torch.stack([*parts, a, b, lost]))
        results = {}
        for layer, factors, (inside, partial, outside, a, b, lost) in zip(layers, computed, on_host(rows).tolist(), strict=True):
            total = inside + partial + outside
            measured = {
                "update_norm": total**0.5 * layer.scaling,
                "inside": inside / total if total else 0.0,
                "partial": partial / total if total else 0.0,
                "outside": outside / total if total else 0.0,
            }
            if off or total == 0:
                reason = "the update is zero" if total == 0 else "lambda_partial and lambda_outside are 0"
                results[layer.name] = LayerResult(LayerReport(action="left_alone", reason=reason, measured=measured), None)
                continue
            kept = inside + a**2 * partial + b**2 * outside
            measured |= {"attenuation_partial": a, "attenuation_outside": b, "energy_lost_by_rank": lost}
            measured["corrected_norm"] = (kept * (1 - lost)) ** 0.5 * layer.scaling
            results[layer.name] = LayerResult(LayerReport(action="corrected", measured=measured), factors)
        return results

    def summary(self, results: Mapping[str, LayerReport]) -> str:
        """How many layers were corrected, how much of the update remains, and what the output rank cost."""
        corrected = [report for report in results.values() if report.action == "corrected"]
        if not corrected:
            return "both λ are 0 or every update is zero: the adapter is as it was trained"
        before = sum(report.measured["update_norm"] ** 2 for report in results.values()) ** 0.5
        after = sum(report.measured["corrected_norm"] ** 2 for report in corrected) ** 0.5
        rank = (
            "twice the rank, exact"
            if self.config.output_rank == "exact"
            else (
                f"cut back to the original rank, at most {max(report.measured['energy_lost_by_rank'] for report in corrected):.2%} of a layer's energy lost"
            )
        )
        return f"{len(corrected)} of {len(results)} layers corrected ({rank}); ‖ΔW‖ went from {before:.3g} to {after:.3g}"


class CSULoRACallback(NamedCallback):
    """CSULoRA (arXiv 2605.30640), a RECONSTRUCTION, at the end of training, for any Transformers `Trainer` on a PEFT model.

    Checks at the start of training that it can act. The keywords are the fields of `CsuloraConfig`; see `NamedCallback`.
    """

    options = CsuloraConfig
    name = "csulora"


def apply_csulora(
    model: nn.Module, subspace: AlignmentSubspace, *, skip_modules: Iterable[str] = (), adapter: str | None = None, **options: Any
) -> SafetyReport:
    """Correct a PEFT model's adapter in place with the reconstructed CSULoRA. The next save also writes its report.

    A short form of `trl_safety.correct(model, subspace, CsuloraConfig(...))`, with the same return value and errors.

    Args:
        model: with one active LoRA adapter, trained.
        subspace: must hold every adapted layer.
        skip_modules: modules to leave alone.
        adapter: the adapter's name; by default the active one.
        **options: the fields of `CsuloraConfig`.
    """
    return correct_by_name(model, subspace, CsuloraConfig, "csulora", options, skip_modules, adapter)
