"""The options of Safe LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from trl_safety.config.correction import CorrectionConfig
from trl_safety.config.options import Operator
from trl_safety.config.requirements import OUTSIDE_SFT


class SafeLoraConfig(CorrectionConfig):
    """Safe LoRA (arXiv 2405.16833): replace B by C·B in the layers whose update is least aligned."""

    hook: ClassVar[str] = "trl_safety.corrections.safe_lora:SafeLoraCorrection"
    source: ClassVar[str] = "Safe LoRA, arXiv 2405.16833"
    shown: ClassVar[Mapping[str, str]] = {
        **CorrectionConfig.shown,
        **OUTSIDE_SFT,
        "unsloth: true": "tests/training/test_unsloth.py::test_what_reads_the_factors_acts_and_the_rest_is_refused",
    }

    threshold: Annotated[float, Field(ge=-1, le=1)] | None = None
    """τ: correct the layers with cos(C·ΔW, ΔW) ≤ τ, rounded to 5 decimals as in the authors' code. Default 0.5."""
    layers: Annotated[int, Field(ge=1)] | None = None
    """K: correct the K layers with the smallest cosine, instead of a threshold."""
    operator: Operator = "scaled"
    """How the alignment subspace acts: 'scaled' is the authors' C = VVᵀ/‖V‖_F, 'orthogonal' is the projector UₖUₖᵀ."""

    @property
    def idle(self) -> str | None:
        """See `CorrectionConfig.idle`."""
        if self.threshold is not None and self.threshold < 0:
            return f"threshold = {self.threshold:g}: no cosine with C·ΔW is negative, since C and the projector are positive semidefinite"
        return None

    @model_validator(mode="before")
    @classmethod
    def _default_threshold(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("threshold") is None and data.get("layers") is None:
            return {**data, "threshold": 0.5}
        return data

    @model_validator(mode="after")
    def _one_choice(self) -> SafeLoraConfig:
        if (self.threshold is None) == (self.layers is None):
            raise ValueError("give either threshold (e.g. 0.35) or layers (e.g. 10), not both")
        return self


SafeLoRAConfig = SafeLoraConfig
"""The name as spelt by the paper and the callback."""
