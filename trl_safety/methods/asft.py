"""AsFT: Anchoring Safety in Fine-Tuning within a narrow basin (arXiv 2506.08473): its penalty term.

Not Anchored SFT ("ASFT", arXiv 2509.23753).
"""

from __future__ import annotations

from torch import Tensor

from trl_safety.linalg.alignment import residual_norm_squared
from trl_safety.linalg.operators import Operator


def penalty(B: Tensor, A: Tensor, operator: Operator) -> Tensor:
    """‖(I − M)·B·A‖²_F for each layer, differentiable in B and A.

    Computed as tr(Bᵀ(I − M)²B · AAᵀ): two r × r Grams instead of the authors' dense out × out and out × in products.

    Args:
        B: (…, out, r), float32 or better; leading dimensions are layers of one shape.
        A: (…, r, in), float32 or better.
        operator: M, the alignment operator C (authors) or the orthogonal projector.

    Returns:
        Shape (…): the summand of the paper's loss term. If ΔW includes PEFT's scaling s, multiply by s².
    """
    return residual_norm_squared(B, A, operator)
