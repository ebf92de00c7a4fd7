"""What every correction of a trained adapter is: all layers in, all layers out, without model or trainer."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_safety.config.correction import CorrectionConfig
from trl_safety.reports.report import SOURCES, LayerReport, MethodReport
from trl_safety.subspace.layer import LayerSubspace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerInput:
    """One trained layer: ΔW = scaling · B · A with B (out, r) and A (r, in), as they are stored, and its alignment subspace."""

    name: str
    stored: tuple[Tensor, Tensor]
    scaling: float
    subspace: LayerSubspace
    device: torch.device

    def factors(self) -> tuple[Tensor, Tensor]:
        """B and A to compute with; made anew at every call, so that no two layers' are held."""
        B, A = self.stored
        return working_factors(B.to(self.device), A.to(self.device))

    def cast(self, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """New factors in the dtype and on the device of those that they replace."""
        return B.to(self.stored[0]), A.to(self.stored[1])


@dataclass(frozen=True)
class LayerResult:
    """What a correction did to one layer; `factors` is None where it left the layer alone."""

    report: LayerReport
    factors: tuple[Tensor, Tensor] | None


class Correction(ABC):
    """A correction of a trained adapter: all layers in, all layers out, without model or trainer."""

    name: str
    reconstruction = False
    all_layers = False
    """Whether it also acts on layers of the subspace that the adapter does not have."""

    def __init__(self, config: CorrectionConfig) -> None:
        self.config = config

    @abstractmethod
    def check(self, layers: Mapping[str, LayerSubspace]) -> None:
        """Raise where the correction could not act on these subspaces."""

    def check_ranks(self, ranks: Mapping[str, int], layers: Mapping[str, LayerSubspace]) -> None:  # noqa: B027  # most accept any
        """Raise where the correction could not act on an adapter of these ranks; `layers` are all that it acts on, by module."""

    def keeps_ranks(self, ranks: Mapping[str, int]) -> bool:
        """Whether an adapter of these ranks has the same ones afterwards."""
        return True

    @abstractmethod
    def run(self, layers: Sequence[LayerInput]) -> dict[str, LayerResult]:
        """Correct every layer."""

    @abstractmethod
    def summary(self, results: Mapping[str, LayerReport]) -> str:
        """One sentence on what was done."""

    def report(self, results: Mapping[str, LayerResult], summary: str | None = None) -> MethodReport:
        """The method's part of the safety report."""
        layers = {name: result.report for name, result in results.items()}
        return MethodReport(
            name=self.name,
            source=SOURCES[self.name],
            reconstruction=self.reconstruction,
            settings=self.config.model_dump(),
            acted=any(layer.action == "corrected" for layer in layers.values()),
            summary=summary or self.summary(layers),
            layers=layers,
        )


def working_factors(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Factors in float64, on their device: a trained adapter is small, and the Grams square the condition number."""
    return B.detach().double(), A.detach().double()


def on_host(rows: Sequence[Tensor]) -> Tensor:
    """Every layer's measurements as one table, in one transfer."""
    return torch.stack([row.to(rows[0].device) for row in rows]).cpu()


def _acted(results: Mapping[str, LayerResult]) -> bool:
    return any(result.factors is not None for result in results.values())
