"""The data-free buffer: the user's adapter trains on W_aligned − γ·V instead of W_aligned, with V = W_aligned − W_base.

Task arithmetic (arXiv 2212.04089) in reverse: what alignment added is removed before training, so that harmful samples have
little left to unlearn, and it is restored when the adapter is used on W_aligned.
"""

from __future__ import annotations

import torch
from torch import Tensor


def take_out(aligned: Tensor, base: Tensor, gamma: float) -> Tensor:
    """W_aligned − γ·(W_aligned − W_base) in W_aligned's dtype, computed in float32; for γ = 0 or 1, one of the two, bit for bit.

    Args:
        aligned: W_aligned, of any shape.
        base: W_base, of the same shape.
        gamma: γ.
    """
    if gamma == 0:
        return aligned
    if gamma == 1:
        return base.to(aligned.dtype)
    return torch.lerp(aligned.float(), base.float(), gamma).to(aligned.dtype)


def low_rank(U: Tensor, values: Tensor, Z: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Factors (out, k) and (k, in) of −γ·V_k = −γ·U Σ Zᵀ, which is added to the layer during training.

    Args:
        U: (out, k).
        values: σ, (k,).
        Z: (in, k).
        gamma: γ.
    """
    return U * (values * -gamma), Z.mT
