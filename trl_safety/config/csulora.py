"""The options of CSULoRA."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from trl_safety.config.correction import CorrectionConfig


class CsuloraConfig(CorrectionConfig):
    """CSULoRA (arXiv 2605.30640), a RECONSTRUCTION: keep the aligned part of ΔW, attenuate the rest by its energy."""

    hook: ClassVar[str] = "trl_safety.corrections.csulora:CsuloraCorrection"
    source: ClassVar[str] = "CSULoRA, arXiv 2605.30640 (reconstruction: its formula could not be read here)"
    needs: ClassVar[str] = "an alignment subspace with a rank"

    lambda_partial: Annotated[float, Field(ge=0)] = 1.0
    """λ_M: attenuation of the part that is aligned on one side only."""
    lambda_outside: Annotated[float, Field(ge=0)] = 1.0
    """λ_O: attenuation of the part outside the subspace."""
    output_rank: Literal["exact", "original"] = "exact"
    """'exact' doubles the adapter's rank and loses nothing; 'original' truncates to the adapter's rank and reports the energy lost."""

    @property
    def idle(self) -> str | None:
        """See `CorrectionConfig.idle`."""
        return (
            "lambda_partial = 0 and lambda_outside = 0: nothing is attenuated" if self.lambda_partial == self.lambda_outside == 0 else None
        )


CSULoRAConfig = CsuloraConfig
"""The name as spelt by the paper and the callback."""
