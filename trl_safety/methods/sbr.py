"""SBR: hidden-state bounding on a few harmful prompts (arXiv 2605.05995): its loss term."""

from __future__ import annotations

import torch
from torch import Tensor


def last_states(hidden: Tensor, lengths: Tensor) -> Tensor:
    """The state of every prompt's last token.

    Args:
        hidden: (K, T, d), the last layer's states of right-padded prompts.
        lengths: (K,), number of tokens of each prompt.

    Returns:
        (K, d), float32 or better.
    """
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    states = hidden[rows, lengths.to(hidden.device) - 1]
    return states.to(torch.promote_types(states.dtype, torch.float32))


def distance(states: Tensor, reference: Tensor) -> Tensor:
    """mean_k mean_d (h_θ(x_k) − h_0(x_k))², 0-dimensional, differentiable in `states`.

    The paper's formula sums over the d hidden units, mean_k ‖h_θ(x_k) − h_0(x_k)‖²; its code averages over them, and so does this.

    Args:
        states: h_θ, (K, d), float32 or better.
        reference: h_0, (K, d).
    """
    return (states - reference.to(states)).square().mean()
