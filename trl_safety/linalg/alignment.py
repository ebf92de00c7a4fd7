"""How an update ΔW = B·A relates to an alignment subspace: the residual of an operator, the cosine with its image, and its three parts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trl_safety.linalg.low_rank import gram, product_inner, product_norm_squared, trace_product
from trl_safety.linalg.operators import Operator


def residual_norm_squared(B: Tensor, A: Tensor, operator: Operator) -> Tensor:
    """‖(I − M)·B·A‖²_F for each layer, differentiable in B and A, as tr(Bᵀ(I − M)²B · AAᵀ): two r × r Grams.

    Args:
        B: (…, out, r), float32 or better; leading dimensions are layers of one shape.
        A: (…, r, in), float32 or better.
        operator: M.

    Returns:
        Shape (…).
    """
    return trace_product(operator.residual_gram(B), A @ A.mT)


def cosine(image: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """cos(M·ΔW, ΔW) for ΔW = B·A; PEFT's scaling cancels out of it.

    Args:
        image: M·B, (out, r).
        B: (out, r).
        A: (r, in).

    Returns:
        The cosine, ‖ΔW‖_F and ‖M·ΔW‖_F, each 0-dimensional. The cosine is 0 if ΔW or M·ΔW is 0.
    """
    norm = product_norm_squared(B, A).clamp(min=0).sqrt()
    image_norm = product_norm_squared(image, A).clamp(min=0).sqrt()
    product = norm * image_norm
    value = torch.where(product > 0, product_inner(image, B, A) / product.clamp(min=torch.finfo(B.dtype).tiny), 0)
    return value, norm, image_norm


class Energies(NamedTuple):
    """‖F‖²_F, ‖M‖²_F and ‖O‖²_F, each 0-dimensional."""

    inside: Tensor
    partial: Tensor
    outside: Tensor


def energies(B: Tensor, A: Tensor, U: Tensor, Z: Tensor) -> Energies:
    """Squared norms of the parts of ΔW = B·A inside the subspace on both sides, on one side, and on neither, through r × r Grams.

    Args:
        B: (out, r), float64 so that the subtraction loses no precision.
        A: (r, in).
        U: Uₖ, (out, k), orthonormal columns.
        Z: Zₖ, (in, k), orthonormal columns.
    """
    inside_left, inside_right = gram(U.mT @ B), gram((A @ Z).mT)
    outside_left = gram(B - U @ (U.mT @ B))
    outside_right = gram((A - (A @ Z) @ Z.mT).mT)
    return Energies(
        trace_product(inside_left, inside_right),
        trace_product(inside_left, outside_right) + trace_product(outside_left, inside_right),
        trace_product(outside_left, outside_right),
    )


def slope_score(slopes: Tensor, norms: Tensor) -> Tensor:
    """How far a step of gradient descent moves along a direction v, for each layer: −⟨∇L, v⟩ / ‖v‖_F, shape (layers,).

    With v a safety direction, this is the safety gradient score of arXiv 2605.24550 (Section 3): negative if a step moves against v, as in
    the paper's figures for aligned models.

    Args:
        slopes: ⟨∇L, v⟩, (layers,): the loss's slope along v.
        norms: ‖v‖_F, (layers,). The score is 0 where v is 0.
    """
    return torch.where(norms > 0, -slopes / norms.clamp(min=torch.finfo(norms.dtype).tiny), 0)
