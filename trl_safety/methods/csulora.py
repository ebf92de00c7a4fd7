"""CSULoRA (arXiv 2605.30640), a RECONSTRUCTION: the formula could not be read here, only what is summarised below.

Known for certain: the method corrects a trained adapter; the subspace comes from V = W_aligned − W_base; ΔW is split into fully
aligned, partially aligned and off-subspace parts; a penalised minimum-change problem with a closed form keeps the first part and
smoothly attenuates the others by their relative energy, with no threshold. The formulas below are ours:

    P_L = UₖUₖᵀ,  P_R = ZₖZₖᵀ,  Q = I − P
    F = P_L ΔW P_R,  M = P_L ΔW Q_R + Q_L ΔW P_R,  O = Q_L ΔW Q_R      (mutually orthogonal, summing to ΔW)
    min_X ‖X − ΔW‖² + λ_M e_M ‖X_M‖² + λ_O e_O ‖X_O‖²,   e_j = ‖j‖²_F / ‖ΔW‖²_F
    X = F + M/(1 + λ_M e_M) + O/(1 + λ_O e_O)
"""

from __future__ import annotations

import torch
from torch import Tensor

from trl_safety.linalg.alignment import Energies, energies
from trl_safety.linalg.low_rank import product_norm_squared, truncate_product

__all__ = ["Energies", "attenuations", "correct", "cut_back", "energies"]


def attenuations(parts: Energies, lambda_partial: float, lambda_outside: float) -> tuple[Tensor, Tensor]:
    """a = 1/(1 + λ_M e_M) and b = 1/(1 + λ_O e_O), the factors of M and O in the closed form; 1 for a zero update."""
    total = parts.inside + parts.partial + parts.outside
    total = torch.where(total > 0, total, torch.ones_like(total))
    return 1 / (1 + lambda_partial * parts.partial / total), 1 / (1 + lambda_outside * parts.outside / total)


def correct(B: Tensor, A: Tensor, U: Tensor, Z: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """X = F + a·M + b·O as factors of rank 2r: [P_L B, Q_L B] · [A P_R + a A Q_R ; a A P_R + b A Q_R].

    Args:
        B: (out, r).
        A: (r, in).
        U: Uₖ, (out, k).
        Z: Zₖ, (in, k).
        a: attenuation of the partially aligned part.
        b: attenuation of the part outside the subspace.

    Returns:
        Factors of shape (out, 2r) and (2r, in).
    """
    left_in = U @ (U.mT @ B)
    right_in = (A @ Z) @ Z.mT
    right_out = A - right_in
    return torch.cat([left_in, B - left_in], dim=1), torch.cat([right_in + a * right_out, a * right_in + b * right_out])


def cut_back(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of the given rank that are closest to B·A, and the share of ‖B·A‖²_F that the cut lost (0-dimensional)."""
    total = product_norm_squared(B, A)
    left, right, lost = truncate_product(B, A, rank)
    return left, right, lost / torch.where(total > 0, total, torch.ones_like(total))
