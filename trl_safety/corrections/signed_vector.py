"""The signed vector on a trained adapter: b·V is added, whatever weights the adapter was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trl_safety.config.signed_vector import ServedVectorConfig
from trl_safety.corrections.alignment_vector import AlignmentVectorCorrection
from trl_safety.corrections.base import LayerResult, changed, continued
from trl_safety.reports.report import MethodReport

PENDING = "; V is still to be added to the adapter"


class SignedVectorCorrection(AlignmentVectorCorrection):
    """ΔW ← ΔW + b·V_k: the alignment vector with γ = b and κ = 1, whose report continues that of the training."""

    name = "signed_vector"
    strength = "serve"

    def __init__(self, config: ServedVectorConfig) -> None:
        super().__init__(config.vector())
        self.served = config

    def report(self, results: Mapping[str, LayerResult], summary: str | None = None) -> MethodReport:
        """As for the alignment vector, with this method's own settings."""
        settings = self.served.model_dump(exclude={"corrected_checkpoints"})
        return super().report(results, summary).model_copy(update={"source": self.served.source, "settings": settings})

    @property
    def _nothing(self) -> str:
        return "serve is 0"

    def reports(self, earlier: Sequence[MethodReport], results: Mapping[str, LayerResult] | None) -> list[MethodReport]:
        """All methods' reports; until V has been added, the report of the training stands."""
        trained = any(method.name == self.name for method in earlier)
        if trained and (results is None or not changed(results)):
            return list(earlier)
        return super().reports(earlier, None) if results is None else continued(self.report(results), earlier, PENDING)

    def not_done(self, earlier: Sequence[MethodReport], why: str) -> list[MethodReport]:
        """See `Correction.not_done`; the report of the training no longer says that V is still to be added."""
        said = [method.model_copy(update={"summary": method.summary.removesuffix(PENDING)}) for method in earlier]
        return super().not_done(said, why)
