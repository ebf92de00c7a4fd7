"""The signed alignment vector: RESTA (arXiv 2402.11746) and task arithmetic (arXiv 2212.04089) applied to low-rank factors."""

from __future__ import annotations

import torch
from torch import Tensor


def add(B: Tensor, A: Tensor, U: Tensor, values: Tensor, Z: Tensor, *, gamma: float, kappa: float, scaling: float) -> tuple[Tensor, Tensor]:
    """Factors of κ·ΔW + γ·V_k for ΔW = s·B·A and V_k = U Σ Zᵀ, the leading part of V = W_aligned − W_base.

    RESTA adds γ·V to all weights of a merged model; this does the same to an adapter, whose rank becomes r + k. It is exact for V_k.

    Args:
        B: (out, r).
        A: (r, in).
        U: (out, k).
        values: σ, (k,).
        Z: (in, k).
        gamma: γ; a negative value removes V.
        kappa: κ; a value below 1 also shrinks the user's update.
        scaling: s, PEFT's scaling of the layer.

    Returns:
        (out, r + k) and (r + k, in), for the same scaling; singular values are split evenly between the two.
    """
    root = values.sqrt()
    left = torch.cat([kappa * B, U * (root * (gamma / scaling))], dim=1)
    return left, torch.cat([A, root.unsqueeze(-1) * Z.mT])


def inner(B: Tensor, A: Tensor, U: Tensor, values: Tensor, Z: Tensor) -> Tensor:
    """⟨B·A, V_k⟩_F without either product, 0-dimensional."""
    return ((U.mT @ B) * ((A @ Z).mT * values.unsqueeze(-1))).sum()


def drop_and_rescale(B: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """DARE (arXiv 2311.03099): drop every entry with probability p, and divide the others by 1 − p.

    Acts on the entries of B, where the paper acts on those of ΔW: ΔW = s·B·A keeps its expectation and its rank r.

    Args:
        B: (out, r).
        probability: p, in [0, 1).
        generator: on the CPU, so that every device gets the same draws.
    """
    kept = torch.rand(B.shape, generator=generator) >= probability
    return B * kept.to(B.device) / (1 - probability)
