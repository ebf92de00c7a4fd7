"""Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning Large Language Models (arXiv 2405.16833)."""

from __future__ import annotations

from torch import Tensor

from trl_safety.linalg.alignment import cosine
from trl_safety.linalg.operators import Operator

__all__ = ["COSINE_DECIMALS", "cosine", "project", "select"]

COSINE_DECIMALS = 5
"""The authors' code rounds the cosine to this before it compares."""


def project(B: Tensor, operator: Operator) -> Tensor:
    """M·B; the layer's update becomes M·ΔW (Equation 3), and the adapter's rank stays the same.

    Args:
        B: (out, r), float64 for the Grams of `cosine`.
        operator: M, the alignment operator C (authors) or the orthogonal projector.
    """
    return operator.apply(B)


def select(cosines: Tensor, *, threshold: float | None = None, layers: int | None = None) -> Tensor:
    """Which layers to correct, as a mask over `cosines` of shape (layers,).

    `threshold`: cosine ≤ τ. `layers`: cosine ≤ the K-th smallest one; layers that tie with it are corrected, too, as in
    the authors' code. Cosines are rounded to 5 decimals first.
    """
    rounded = cosines.double().round(decimals=COSINE_DECIMALS)
    if layers is not None:
        return rounded <= rounded.sort().values[min(layers, len(rounded)) - 1]
    if threshold is None:
        raise ValueError("select needs threshold or layers")
    return rounded <= threshold
