"""The options of AsFT."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trl_safety.config.options import Operator, Options


class AsftConfig(Options):
    """AsFT (arXiv 2506.08473): the loss term λ Σ ‖(I − C) ΔW‖²_F."""

    weight: Annotated[float, Field(ge=0)] = 1.0
    """λ. The paper found 0.1 to 10 to work. 0 measures and logs the penalty and protects nothing."""
    operator: Operator = "scaled"
    """How the alignment subspace acts, see `safe_lora.operator`."""
    scaled: bool = False
    """Penalise ΔW = s·B·A with PEFT's scaling s; false is the authors' ΔW = B·A."""
    paper_lambda: bool = False
    """Count λ once per micro-batch as the authors' code does, so that it grows with gradient accumulation."""
