"""Naive dense float64 references: the formulas written out, with every matrix formed."""

from __future__ import annotations

import torch
from torch import Tensor


def operator(V: Tensor, kind: str, rank: int | None = None) -> Tensor:
    """C = VVᵀ/‖V‖_F, or the projector onto the leading left singular vectors."""
    V = V.double()
    if kind == "scaled" and rank is None:
        return V @ V.T / V.norm()
    U, S, _ = torch.linalg.svd(V, full_matrices=False)
    U = U[:, :rank]
    return U @ U.T if kind == "orthogonal" else U @ torch.diag(S[:rank] ** 2) @ U.T / V.norm()


def penalty(B: Tensor, A: Tensor, M: Tensor) -> Tensor:
    """‖(I − M) B A‖²_F."""
    return ((torch.eye(len(M), dtype=torch.float64) - M) @ B.double() @ A.double()).square().sum()


def cosine(B: Tensor, A: Tensor, M: Tensor) -> float:
    """cos(M·ΔW, ΔW)."""
    update = B.double() @ A.double()
    return torch.nn.functional.cosine_similarity((M @ update).flatten(), update.flatten(), dim=0).item()


def split(update: Tensor, U: Tensor, Z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """F, M and O of the csulora reconstruction."""
    left, right = U.double() @ U.double().T, Z.double() @ Z.double().T
    left_rest, right_rest = torch.eye(len(left)) - left, torch.eye(len(right)) - right
    update = update.double()
    return left @ update @ right, left @ update @ right_rest + left_rest @ update @ right, left_rest @ update @ right_rest


def reinforced_merge(
    user: tuple[Tensor, Tensor, float],
    reinforce: tuple[Tensor, Tensor, float],
    alpha: float,
    threshold: float = 0.01,
    weights: tuple[float, float] = (0.5, 0.5),
) -> Tensor:
    """w_U·W_U + w_R·(I − αQQᵀ)·W_R, with Q an orthonormal basis of the columns of B·V_eff."""
    (B, A, s), (B_r, A_r, s_r) = ((b.double(), a.double(), scaling) for b, a, scaling in (user, reinforce))
    values, vectors = torch.linalg.eigh(A @ A.T)
    Q, _ = torch.linalg.qr(B @ vectors[:, values > threshold * values.max()])
    projected = (torch.eye(len(B), dtype=torch.float64) - alpha * Q @ Q.T) @ (s_r * B_r @ A_r)
    return weights[0] * s * B @ A + weights[1] * projected
