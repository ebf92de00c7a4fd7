"""Jailbreak to Protect: Buffering and Reinforcing via Temporary Jailbreaking for Safe Fine-Tuning (arXiv 2605.24550)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import eigh, svd

from trl_safety.linalg.alignment import slope_score as safety_gradient_score
from trl_safety.linalg.low_rank import gram

__all__ = ["concatenate", "orthogonalise", "safety_gradient_score", "user_directions"]


def user_directions(B: Tensor, A: Tensor, collapse_threshold: float) -> tuple[Tensor, Tensor]:
    """The output directions that the user's update uses: an orthonormal basis Q of B_eff = B·V_eff.

    V_eff holds the eigenvectors of G = A·Aᵀ with eigenvalue > τ·max: all of them if nothing collapsed (B_eff then spans the same space
    as B), fewer on rank collapse. Differs from the authors' code in two ways: their code uses the whole of B if the number kept
    happens to equal the reinforcing rank, this code does not; and their QR of a B without full column rank invents directions,
    this code does not.

    Args:
        B: (out, r), float64.
        A: (r, in), float64.
        collapse_threshold: τ.

    Returns:
        Q, (out, min(out, r)), with a zero column for every direction that is dropped; and the number kept, 0-dimensional. No
        shape depends on the values, so no host synchronisation is needed.
    """
    values, vectors = eigh(gram(A.mT))
    kept = values > collapse_threshold * values[..., -1:]
    U, singular, _ = svd(B @ (vectors * kept.unsqueeze(-2)), full_matrices=False)
    real = singular > singular[..., :1] * (max(B.shape[-2:]) * torch.finfo(B.dtype).eps)
    return U * real.unsqueeze(-2), kept.sum(-1)


def orthogonalise(B_reinforce: Tensor, Q: Tensor, alpha: float) -> Tensor:
    """(I − αQQᵀ)·B_R; the layer's update becomes W̃_R = (I − αQQᵀ)·W_R (Section 4.3).

    Args:
        B_reinforce: (out, r_R).
        Q: (out, k), orthonormal or zero columns.
        alpha: α; 1 removes all of W_R in the user's directions, 0 removes nothing.
    """
    return B_reinforce - alpha * (Q @ (Q.mT @ B_reinforce))


def concatenate(user: tuple[Tensor, Tensor, float], reinforce: tuple[Tensor, Tensor, float], scaling: float) -> tuple[Tensor, Tensor]:
    """One pair of factors for the sum of two updates: s·B·A = w_U·B_U·A_U + w_R·B_R·A_R, of rank r_U + r_R.

    Args:
        user: B_U (out, r_U), A_U (r_U, in) and its factor: PEFT's scaling times the merge weight.
        reinforce: B_R, A_R and their factor, in the same form.
        scaling: s, PEFT's scaling of the layer that the factors are for.
    """
    (B_user, A_user, user_factor), (B_reinforce, A_reinforce, reinforce_factor) = user, reinforce
    B = torch.cat([B_user * (user_factor / scaling), B_reinforce * (reinforce_factor / scaling)], dim=1)
    return B, torch.cat([A_user, A_reinforce])
