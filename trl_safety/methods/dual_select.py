"""DualSelect (arXiv 2606.09866): references and samples chosen by their losses and the conflict of their gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def score(losses: Tensor, cosines: Tensor, mu: float, nu: float) -> Tensor:
    """μ·loss − ν·cos(g, g_other): high if the sample's loss is high and its gradient opposes the other set's.

    Args:
        losses: (n,) mean loss over each sample's supervised tokens.
        cosines: (n,) cosine of each sample's gradient with the other set's direction.
        mu: μ, weight of the loss.
        nu: ν, weight of the conflict.

    Returns:
        (n,) in float64, because near ties decide which samples are kept.
    """
    return mu * losses.double() - nu * cosines.double()


def highest(scores: Tensor, count: int) -> Tensor:
    """(n,) mask of the `count` highest scores: the inner maximum over references."""
    return _first(scores.argsort(descending=True, stable=True), count)


def lowest(scores: Tensor, count: int) -> Tensor:
    """(n,) mask of the `count` lowest scores: the outer minimum over the user's samples."""
    return _first(scores.argsort(stable=True), count)


def within_budget(scores: Tensor, tokens: Tensor, share: float) -> Tensor:
    """(n,) mask of the lowest scores whose supervised tokens together stay within a share of the batch's; at least one sample is kept.

    Args:
        scores: (n,).
        tokens: (n,) number of supervised tokens of each sample.
        share: of the batch's supervised tokens, in (0, 1). A batch of two or more samples always loses at least one.
    """
    order = scores.argsort(stable=True)
    spent = tokens[order].double().cumsum(0)
    # A fixed margin far below one token, because a share such as 0.9 is not exact in binary.
    fits = spent <= share * spent[-1] + 1e-6
    fits[0] = True
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[order] = fits
    return mask


def soft_weights(scores: Tensor, temperature: float) -> Tensor:
    """(n,) softmax(score / T), the closed form of the entropy-regularised maximum; pass −score for the minimum."""
    return torch.softmax(scores.double() / temperature, dim=0)


def cosine(dots: Tensor, squares: Tensor, direction: Tensor) -> Tensor:
    """(n,) cosines of gradients with a direction, from their inner products and squared norms; 0 for a zero gradient.

    Args:
        dots: (n,) ⟨gᵢ, d⟩.
        squares: (n,) ‖gᵢ‖².
        direction: (P,) d.
    """
    product = squares.double().clamp(min=0).sqrt() * torch.linalg.vector_norm(direction, dtype=torch.float64)
    return torch.where(product > 0, dots.double() / product.clamp(min=torch.finfo(torch.float64).tiny), 0)


def mean(weights: Tensor, gradients: Tensor, factors: Tensor) -> Tensor:
    """Σ wᵢ fᵢ gᵢ / Σ wᵢ: the hard and the soft update are both means, as in the authors' code.

    Args:
        weights: (n,) w, not all zero.
        gradients: (n, P) gradient of each sample's share of the batch's loss.
        factors: (n,) f, which turns that gradient into the gradient of the sample's own mean loss.
    """
    return (weights / weights.sum() * factors).to(gradients.dtype) @ gradients


def _first(order: Tensor, count: int) -> Tensor:
    mask = torch.zeros_like(order, dtype=torch.bool)
    mask[order[:count]] = True
    return mask
