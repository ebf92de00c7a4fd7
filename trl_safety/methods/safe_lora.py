"""Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning Large Language Models (arXiv 2405.16833)."""

from __future__ import annotations

import torch
from torch import Tensor

from trl_safety.linalg.low_rank import product_inner, product_norm_squared
from trl_safety.linalg.operators import Operator

COSINE_DECIMALS = 5
"""The authors' code rounds the cosine to this before it compares."""


def project(B: Tensor, operator: Operator) -> Tensor:
    """M·B, which makes the layer's update M·ΔW (Equation 3) and keeps the adapter's rank.

    Args:
        B: (out, r), float64 for the Grams of `cosine`.
        operator: M, the alignment operator C (authors) or the orthogonal projector.
    """
    return operator.apply(B)


def cosine(image: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """cos(M·ΔW, ΔW) for ΔW = B·A, the measure of Section 3.2; PEFT's scaling cancels out of it.

    Args:
        image: M·B, (out, r).
        B: (out, r).
        A: (r, in).

    Returns:
        The cosine, ‖ΔW‖_F and ‖M·ΔW‖_F, each 0-dimensional. The cosine is 0 where ΔW or M·ΔW is 0, as in the authors' code.
    """
    norm = product_norm_squared(B, A).clamp(min=0).sqrt()
    image_norm = product_norm_squared(image, A).clamp(min=0).sqrt()
    product = norm * image_norm
    value = torch.where(product > 0, product_inner(image, B, A) / product.clamp(min=torch.finfo(B.dtype).tiny), 0)
    return value, norm, image_norm


def select(cosines: Tensor, *, threshold: float | None = None, layers: int | None = None) -> Tensor:
    """Which layers to correct, as a mask over `cosines` of shape (layers,).

    `threshold`: cosine ≤ τ. `layers`: cosine ≤ the K-th smallest one; layers that tie with it are corrected too, as in
    the authors' code. Cosines are rounded to 5 decimals first.
    """
    rounded = cosines.double().round(decimals=COSINE_DECIMALS)
    if layers is not None:
        return rounded <= rounded.sort().values[min(layers, len(rounded)) - 1]
    if threshold is None:
        raise ValueError("select needs threshold or layers")
    return rounded <= threshold
