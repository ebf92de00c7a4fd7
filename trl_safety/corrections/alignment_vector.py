"""The signed alignment vector as a correction after training."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trl_safety.config.alignment_vector import AlignmentVectorConfig
from trl_safety.corrections.base import LayerInput, LayerResult, on_host
from trl_safety.corrections.callback import NamedCallback
from trl_safety.corrections.on_subspace import SubspaceCorrection
from trl_safety.corrections.registry import correct_by_name
from trl_safety.errors import ConfigurationError, SubspaceError
from trl_safety.linalg.low_rank import product_norm_squared, truncate_product
from trl_safety.methods import alignment_vector
from trl_safety.reports.report import LayerReport, MethodReport, SafetyReport
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.subspace.layer import LayerSubspace


class AlignmentVectorCorrection(SubspaceCorrection):
    """ΔW ← κ·ΔW + γ·V_k."""

    name = "alignment_vector"
    strength = "gamma"
    """The option that sets γ."""
    config: AlignmentVectorConfig

    def check(self, layers: Mapping[str, LayerSubspace]) -> None:
        """Check that every layer has singular vectors, and as many as are asked for."""
        for layer in layers.values():
            if layer.left is None:
                raise SubspaceError(
                    f"layer {layer.name!r}: the subspace keeps V whole, which cannot become a low-rank adapter; build the subspace with a rank or a "
                    "tolerance, or add the whole V to a merged model with `trl-safety add-vector`"
                )
            if self.config.rank is not None and self.config.rank > layer.rank:
                raise SubspaceError(
                    f"{self.name}.rank = {self.config.rank}: the subspace has {layer.rank} directions of layer {layer.name!r}; use at most that many, or "
                    "build it with a larger rank"
                )

    def check_ranks(self, ranks: Mapping[str, int], layers: Mapping[str, LayerSubspace]) -> None:
        """Refuse a cut that would cut nothing."""
        largest = max(ranks.get(name, 0) + (self.config.rank or layer.rank) for name, layer in layers.items())
        if self.config.cut_to is not None and self.config.cut_to >= largest:
            raise ConfigurationError(
                f"{self.name}.cut_to = {self.config.cut_to}: the corrected adapter has rank {largest}, so nothing would be cut; use less, or remove it"
            )

    def keeps_ranks(self, ranks: Mapping[str, int]) -> bool:
        """Only if every layer is cut back to the adapter's own rank."""
        return not self.all_layers and all(rank == self.config.cut_to for rank in ranks.values())

    def report(self, results: Mapping[str, LayerResult], summary: str | None = None) -> MethodReport:
        """As for every correction, except that removing alignment, shrinking or DARE alone does not count as protection."""
        report = super().report(results, summary)
        if self.config.gamma > 0:
            return report
        return report.model_copy(
            update={"acted": False, "summary": f"{report.summary}; NOT a protection, with {self.strength} = {self.config.gamma:g}"}
        )

    def run(self, layers: Sequence[LayerInput]) -> dict[str, LayerResult]:
        """Add V to every layer, with one transfer to the host."""
        config = self.config
        computed, rows = [], []
        for layer in layers:
            trained_B, trained_A = layer.factors()
            left, sigma, right = layer.subspace.factors()
            U, values, Z = (t.to(trained_B) for t in (left[:, : config.rank], sigma[: config.rank], right[:, : config.rank]))
            source = trained_B
            if config.dare:
                generator = torch.Generator().manual_seed(config.seed + zlib.crc32(layer.name.encode()))
                source = alignment_vector.drop_and_rescale(source, config.dare, generator)
            B, A = alignment_vector.add(source, trained_A, U, values, Z, gamma=config.gamma, kappa=config.kappa, scaling=layer.scaling)
            lost = B.new_zeros(())
            if config.cut_to is not None and config.cut_to < A.shape[0]:
                B, A, lost = truncate_product(B, A, config.cut_to)
            computed.append(layer.cast(B, A))
            squares = torch.stack(
                [
                    product_norm_squared(trained_B, trained_A),
                    values.square().sum() / layer.scaling**2,
                    alignment_vector.inner(trained_B, trained_A, U, values, Z) / layer.scaling,
                    product_norm_squared(B, A),
                    lost,
                ]
            )
            rows.append(squares * layer.scaling**2)
        results = {}
        for layer, factors, (update, vector, inner, corrected, lost) in zip(layers, computed, on_host(rows).tolist(), strict=True):
            measured = {
                "update_norm": max(update, 0.0) ** 0.5,
                "vector_norm": abs(config.gamma) * vector**0.5,
                "vector_share": vector / layer.subspace.frobenius_norm**2,
                "cosine": inner / (update * vector) ** 0.5 if update > 0 and vector > 0 else 0.0,
                "corrected_norm": max(corrected, 0.0) ** 0.5,
                "energy_lost_by_rank": lost / (corrected + lost) if corrected + lost > 0 else 0.0,
            }
            if config.gamma == 0 and config.kappa == 1 and not config.dare:
                report = LayerReport(action="left_alone", reason=self._nothing, measured=measured)
                results[layer.name] = LayerResult(report, None)
            else:
                results[layer.name] = LayerResult(LayerReport(action="corrected", measured=measured), factors)
        return results

    @property
    def _nothing(self) -> str:
        """Why no layer is changed, if none is."""
        return f"{self.strength} is 0 and kappa is 1"

    def summary(self, results: Mapping[str, LayerReport]) -> str:
        """What was added, how much of V it is, and what the cut cost."""
        corrected = [report for report in results.values() if report.action == "corrected"]
        if not corrected:
            return f"{self._nothing}: the adapter is as it was trained"
        update, vector = (sum(report.measured[key] ** 2 for report in corrected) ** 0.5 for key in ("update_norm", "vector_norm"))
        share = sum(report.measured["vector_share"] for report in corrected) / len(corrected)
        text = (
            f"{self.config.gamma:g}·V added to {self.config.kappa:g}·ΔW in {len(corrected)} layers; ‖γV‖ is {vector:.3g} and ‖ΔW‖ {update:.3g}, with {share:.1%} of "
            "V's energy on average"
        )
        if self.config.dare:
            text += f"; DARE dropped {self.config.dare:.0%} of B's entries"
        if self.config.cut_to is not None:
            text += f"; cut back to rank {self.config.cut_to}, at most {max(r.measured['energy_lost_by_rank'] for r in corrected):.2%} of a layer's energy lost"
        return text


class AlignmentVectorCallback(NamedCallback):
    """Add the alignment vector (RESTA, arXiv 2402.11746) at the end of training, for any Transformers `Trainer` on a PEFT model.

    Checks at the start of training that it can act. The keywords are the fields of `AlignmentVectorConfig`; see `NamedCallback`.
    """

    options = AlignmentVectorConfig
    name = "alignment_vector"


def apply_alignment_vector(
    model: nn.Module, subspace: AlignmentSubspace, *, skip_modules: Iterable[str] = (), adapter: str | None = None, **options: Any
) -> SafetyReport:
    """ΔW ← κ·ΔW + γ·V_k on a PEFT model's adapter, in place. The next save also writes its report.

    A short form of `trl_safety.correct(model, subspace, AlignmentVectorConfig(...))`, with the same return value and errors.

    Args:
        model: with one active LoRA adapter, trained.
        subspace: must hold every adapted layer.
        skip_modules: modules to leave alone.
        adapter: the adapter's name; by default the active one.
        **options: the fields of `AlignmentVectorConfig`.
    """
    return correct_by_name(model, subspace, AlignmentVectorConfig, "alignment_vector", options, skip_modules, adapter)
