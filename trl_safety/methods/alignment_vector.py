"""The signed alignment vector: RESTA (arXiv 2402.11746) and task arithmetic (arXiv 2212.04089) on low-rank factors."""

from __future__ import annotations

import torch
from torch import Tensor


def add(B: Tensor, A: Tensor, U: Tensor, values: Tensor, Z: Tensor, *, gamma: float, kappa: float, scaling: float) -> tuple[Tensor, Tensor]:
    """Factors of κ·ΔW + γ·V_k for ΔW = s·B·A and V_k = U Σ Zᵀ, the leading part of V = W_aligned − W_base.

    RESTA adds γ·V to all of a merged model's weights; this is the same on an adapter, of rank r + k, exact for V_k.

    Args:
        B: (out, r).
        A: (r, in).
        U: (out, k).
        values: σ, (k,).
        Z: (in, k).
        gamma: γ; negative takes V out.
        kappa: κ; below 1 also shrinks the user's update.
        scaling: s, PEFT's scaling of the layer.

    Returns:
        (out, r + k) and (r + k, in), for the same scaling; singular values are shared evenly between the two.
    """
    root = values.sqrt()
    left = torch.cat([kappa * B, U * (root * (gamma / scaling))], dim=1)
    return left, torch.cat([A, root.unsqueeze(-1) * Z.mT])


def inner(B: Tensor, A: Tensor, U: Tensor, values: Tensor, Z: Tensor) -> Tensor:
    """⟨B·A, V_k⟩_F without either product, 0-dimensional."""
    return ((U.mT @ B) * ((A @ Z).mT * values.unsqueeze(-1))).sum()


def drop_and_rescale(B: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """DARE (arXiv 2311.03099): every entry is dropped with probability p, the others divided by 1 − p.

    On the entries of B rather than of ΔW as in the paper: ΔW = s·B·A stays the same in expectation, and of rank r.

    Args:
        B: (out, r).
        probability: p, in [0, 1).
        generator: on the CPU, so that every device draws alike.
    """
    kept = torch.rand(B.shape, generator=generator) >= probability
    return B * kept.to(B.device) / (1 - probability)
