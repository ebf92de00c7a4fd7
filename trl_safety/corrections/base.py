"""The base class of corrections of a trained adapter: all layers in, all layers out, without model or trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trl_safety.adapters.folder import AdapterFolder, Factors
from trl_safety.adapters.marks import refuse_corrected
from trl_safety.config.correction import CorrectionConfig
from trl_safety.corrections.prepared import Prepared
from trl_safety.errors import SubspaceError
from trl_safety.reports.report import LayerReport, MethodReport
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.subspace.layer import LayerSubspace


@dataclass(frozen=True)
class LayerInput:
    """One trained layer: ΔW = scaling · B · A with B (out, r) and A (r, in), as stored, and its alignment subspace, if any."""

    name: str
    stored: tuple[Tensor, Tensor]
    scaling: float
    bound_subspace: LayerSubspace | None
    device: torch.device

    @property
    def subspace(self) -> LayerSubspace:
        """The layer's alignment subspace.

        Raises:
            SubspaceError: none was given.
        """
        if self.bound_subspace is None:
            raise SubspaceError(f"layer {self.name!r}: has no alignment subspace, which the correction needs; give one")
        return self.bound_subspace

    def factors(self) -> tuple[Tensor, Tensor]:
        """B and A in working precision; made anew on every call, so that never more than one layer's are held."""
        B, A = self.stored
        return working_factors(B.to(self.device), A.to(self.device))

    def cast(self, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """New factors in the dtype and on the device of the ones they replace."""
        return B.to(self.stored[0]), A.to(self.stored[1])


@dataclass(frozen=True)
class LayerResult:
    """What a correction did to one layer; `factors` is None if it left the layer alone."""

    report: LayerReport
    factors: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Bound:
    """A saved adapter, matched with what a correction reads.

    Attributes:
        layers: the module names that the correction acts on, in order, each with its subspace if it reads one.
        further: those of `layers` that the adapter does not have: name → factors of rank 0 and scaling to start from.
        base_check: what was verified about the base model, for the report.
        skipped: module → why it is left alone.
    """

    layers: Mapping[str, LayerSubspace | None]
    further: Mapping[str, Factors]
    base_check: str
    skipped: Mapping[str, str]

    def inputs(self, folder: AdapterFolder, device: torch.device | None = None) -> list[LayerInput]:
        """The input of `Correction.run`, to be computed on `device`, by default where the factors are."""
        found = {**folder.factors, **self.further}
        return [
            LayerInput(name, (found[name].B, found[name].A), found[name].scaling, layer, device or found[name].B.device)
            for name, layer in self.layers.items()
        ]


class Correction(ABC):
    """A correction of a trained adapter: all layers in, all layers out, without model or trainer.

    A correction binds whatever else it needs (an alignment subspace, another adapter) itself: in `bind` for a saved adapter, in
    `further_layers` and `check_live` for a live one.
    """

    name: str
    reconstruction = False
    keeps_uncorrected: Path | None = None
    """Where in a run's output folder the uncorrected adapter is kept; None if it is not kept."""

    def __init__(self, config: CorrectionConfig) -> None:
        self.config = config

    @property
    def reads_subspace(self) -> bool:
        """Whether it needs an alignment subspace."""
        return self.config.subspace_use == "reads"

    def accept(self, config: Any, where: str) -> None:
        """Raise `AdapterError` if an adapter with this configuration must not be corrected."""
        refuse_corrected(config, where)

    @abstractmethod
    def bind(self, folder: AdapterFolder, subspace: AlignmentSubspace | None, skip_modules: Sequence[str], setting: str) -> Bound:
        """Match a saved adapter's layers with what the correction reads, and check that it can act.

        Args:
            folder: the adapter.
            subspace: given if `reads_subspace`.
            skip_modules: modules to leave alone.
            setting: how the user named the adapter, for messages.
        """

    def check_layers(self, layers: Mapping[str, Any]) -> None:  # noqa: B027  # most compare nothing but the subspace
        """Raise if a loaded model's linear layers, keyed by the adapter's names, are not the ones that the correction is for."""

    @abstractmethod
    def check_live(self, model: nn.Module, prepared: Prepared, subspace: AlignmentSubspace | None, skip_modules: Sequence[str]) -> None:
        """Raise if the correction cannot act on a live model's adapter."""

    @abstractmethod
    def further_layers(
        self, model: nn.Module, prepared: Prepared, subspace: AlignmentSubspace | None, skip_modules: Sequence[str]
    ) -> dict[str, LayerSubspace | None]:
        """The layers beyond the adapter's that it acts on, by the live model's names, with their subspaces."""

    def keeps_ranks(self, ranks: Mapping[str, int]) -> bool:
        """Whether an adapter with these ranks keeps them."""
        return True

    @abstractmethod
    def run(self, layers: Sequence[LayerInput]) -> dict[str, LayerResult]:
        """Correct every layer."""

    @abstractmethod
    def summary(self, results: Mapping[str, LayerReport]) -> str:
        """One sentence that says what was done."""

    def report(self, results: Mapping[str, LayerResult], summary: str | None = None) -> MethodReport:
        """The method's part of the safety report."""
        layers = {name: result.report for name, result in results.items()}
        return MethodReport(
            name=self.name,
            source=self.config.source,
            reconstruction=self.reconstruction,
            settings=self.config.model_dump(),
            acted=any(layer.action != "left_alone" for layer in layers.values()),
            summary=summary or self.summary(layers),
            layers=layers,
        )

    def reports(self, earlier: Sequence[MethodReport], results: Mapping[str, LayerResult] | None) -> list[MethodReport]:
        """All methods' reports, this one's last; `results` is None as long as it has not acted."""
        own = (
            self.report({}, "acts when training ends; this checkpoint is uncorrected and can be resumed")
            if results is None
            else self.report(results)
        )
        return [*earlier, own]

    def not_done(self, earlier: Sequence[MethodReport], why: str) -> list[MethodReport]:
        """All methods' reports where this one could not act on what was trained."""
        return [*earlier, self.report({}, why)]


def continued(own: MethodReport, earlier: Sequence[MethodReport], pending: str, otherwise: str = "") -> list[MethodReport]:
    """All methods' reports, where a correction completes a method of its own name that acted during training.

    Args:
        own: the correction's report; it continues the training's, if there is one.
        earlier: the other reports.
        pending: how the training's summary ends until the correction has acted.
        otherwise: how the summary begins if there is no report on the training.
    """
    trained = next((method for method in earlier if method.name == own.name), None)
    before = trained.summary.removesuffix(pending) if trained else otherwise
    whole = own.model_copy(
        update={
            "settings": {**(trained.settings if trained else {}), **own.settings},
            "summary": "; ".join(text for text in (before, own.summary) if text),
            "steps": trained.steps if trained else None,
        }
    )
    return [method for method in earlier if method.name != own.name and method.acted] + [whole]


def working_factors(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Factors in float64, on their device: a trained adapter is small, and Gram matrices square the condition number."""
    return B.detach().double(), A.detach().double()


def on_host(rows: Sequence[Tensor]) -> Tensor:
    """Every layer's measurements as one table on the host, in one transfer."""
    return torch.stack([row.to(rows[0].device) for row in rows]).cpu()


def changed(results: Mapping[str, LayerResult]) -> bool:
    """Whether a correction changed the factors of any layer."""
    return any(result.factors is not None for result in results.values())
