"""The options of the alignment vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from trl_safety.config.correction import CorrectionConfig


class AlignmentVectorConfig(CorrectionConfig):
    """The signed alignment vector (RESTA, arXiv 2402.11746): ΔW ← κ·ΔW + γ·V, appended to the adapter's factors."""

    hook: ClassVar[str] = "trl_safety.corrections.alignment_vector:AlignmentVectorCorrection"
    source: ClassVar[str] = "alignment vector (RESTA, arXiv 2402.11746)"
    needs: ClassVar[str] = "an alignment subspace with a rank"
    measured: ClassVar[Mapping[str, str]] = {
        "vector_norm": "norm of the vector that was added, times gamma",
        "vector_share": "share of the whole vector's squared norm that its rank holds",
    }
    costs: ClassVar[str] = "nothing while training; seconds when it ends, and the adapter's rank becomes r + k"
    loses_by_scaling: ClassVar[bool] = True

    gamma: Annotated[float, Field(ge=-4, le=4)] = 1.0
    """γ: how much of V = W_aligned − W_base is added. 0 adds nothing; a negative value removes alignment."""
    kappa: Annotated[float, Field(ge=0, le=1)] = 1.0
    """κ: how much of the user's update is kept."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """k: how many of V's leading directions to add; null: all that the subspace keeps."""
    cut_to: Annotated[int, Field(ge=1)] | None = None
    """Truncate the corrected adapter from rank r + k to this rank; the report gives the energy lost."""
    all_layers: bool = False
    """Also add V to layers of the subspace that the adapter does not have."""
    dare: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """DARE (arXiv 2311.03099): share of B's entries to drop at random; the others are rescaled."""
    seed: int = 0
    """Random seed of DARE."""

    @model_validator(mode="after")
    def _nothing_unused(self) -> AlignmentVectorConfig:
        if self.seed and not self.dare:
            raise ValueError(f"seed = {self.seed} is used only by dare: give dare, or remove seed")
        return self

    @property
    def every_linear_layer(self) -> bool:
        """With `all_layers`."""
        return self.all_layers

    @property
    def idle(self) -> str | None:
        """See `CorrectionConfig.idle`."""
        return "gamma = 0: nothing of V is added" if self.gamma == 0 else None
